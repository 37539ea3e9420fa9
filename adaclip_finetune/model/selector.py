"""The frame selector: light features of each frame → a temporal encoder → a score for each frame → K of N
(Hard-Top-k)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaclip_finetune.config import Config
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.model.blocks import clip_blocks, start_small
from adaclip_finetune.model.frame_features import Backbone
from adaclip_finetune.model.hard_topk import Selection, annealed_k, select_frames, selection_temperature


class FrameSelector(nn.Module):
    """Selects K of N frames by their features (B, N, F).

    In training, `k` frames are drawn differentiably at `temperature`; `start_epoch` sets both. In evaluation, the
    `top_k` frames with the highest scores are taken. `backbone` computes the features; if it is None, they are CLIP's
    embeddings of the frames.
    """

    k: int
    temperature: float

    def __init__(self, config: Config, backbone: Backbone | None, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        feature_dim = width if backbone is None else backbone.feature_dim
        self.encoder = _build_encoder(config, feature_dim)
        encoded = config.hidden_dim if config.use_rnn else feature_dim
        hidden = config.mlp_hidden_dim
        if config.mlp_type == "mlp":
            self.scorer = nn.Sequential(nn.Linear(encoded, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        else:
            self.scorer = nn.Sequential(nn.Linear(encoded, 1))
        start_small(self.scorer)
        self.top_k = config.top_k
        self._config = config
        self.start_epoch(0)

    @property
    def view(self) -> ImageSpec | None:
        """How the reader must prepare frames for the selector; None if it takes CLIP's frames."""
        return None if self.backbone is None else self.backbone.view

    def start_epoch(self, epoch: int) -> None:
        """Set K and the temperature for a training epoch; epochs count from 0."""
        c = self._config
        self.k = annealed_k(epoch, c.num_frm, c.top_k, c.warmup_epochs)
        self.temperature = selection_temperature(epoch, c.init_tau, c.min_tau, c.exp_decay_factor)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Selection:
        """Select frames (see `select_frames`). In training, `noise` (B, N) replaces the Gumbel noise."""
        k, temperature = (self.k, self.temperature) if self.training else (self.top_k, None)
        # Without autocast: the scores are cheap to compute, and rounding them would change which frames are seen.
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(next(self.scorer.parameters()).dtype)
            encoded = features if self.encoder is None else self.encoder(features)
            return select_frames(self.scorer(encoded).squeeze(-1), k, temperature, noise)


class TransformerEncoder(nn.Module):
    """Encodes frames by a linear map, learned positions and one pre-norm CLIP block: (B, N, F) → (B, N, hidden)."""

    def __init__(self, feature_dim: int, hidden_dim: int, num_frm: int) -> None:
        super().__init__()
        self.projection = nn.Linear(feature_dim, hidden_dim)
        self.positions = nn.Embedding(num_frm, hidden_dim)
        self.transformer = clip_blocks(hidden_dim, 1)
        start_small(self)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.transformer(self.projection(features) + self.positions.weight[: features.shape[1]])
        return out


class RecurrentEncoder(nn.Module):
    """Encodes frames by an LSTM, which may be bidirectional with averaged directions: (B, N, F) → (B, N, hidden)."""

    def __init__(self, feature_dim: int, hidden_dim: int, bidirectional: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(feature_dim, hidden_dim, batch_first=True, bidirectional=bidirectional)
        self.directions = 2 if bidirectional else 1

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.rnn(features)[0].unflatten(-1, (self.directions, -1)).mean(dim=-2)
        return out


def _build_encoder(config: Config, feature_dim: int) -> TransformerEncoder | RecurrentEncoder | None:
    if not config.use_rnn:
        return None
    if config.rnn == "transformer":
        return TransformerEncoder(feature_dim, config.hidden_dim, config.num_frm)
    return RecurrentEncoder(feature_dim, config.hidden_dim, bidirectional=config.rnn == "bilstm")
