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
    """Chooses K of N frames: features (B, N, F) → Selection.

    In training it is a differentiable draw of `k` frames at `temperature`, which `start_epoch` sets; in evaluation it
    is the `top_k` highest scores. `backbone` makes the features; with None they are CLIP's embeddings of the frames.
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
        """How the reader must prepare frames for the selector; None if it has no view of its own."""
        return None if self.backbone is None else self.backbone.view

    def start_epoch(self, epoch: int) -> None:
        """Set K and temperature for a training epoch (from 0)."""
        c = self._config
        self.k = annealed_k(epoch, c.num_frm, c.top_k, c.warmup_epochs)
        self.temperature = selection_temperature(epoch, c.init_tau, c.min_tau, c.exp_decay_factor)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Selection:
        """`noise` (B, N) replaces the Gumbel draw of training. See `select_frames`."""
        k, temperature = (self.k, self.temperature) if self.training else (self.top_k, None)
        # Scores decide which frames are seen at all: too cheap to compute, and too consequential, to round under
        # autocast.
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(next(self.scorer.parameters()).dtype)
            encoded = features if self.encoder is None else self.encoder(features)
            return select_frames(self.scorer(encoded).squeeze(-1), k, temperature, noise)


class TransformerEncoder(nn.Module):
    """Linear to hidden_dim + learned positions + one pre-norm CLIP block: (B, N, F) → (B, N, hidden)."""

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
    """An LSTM, or a bidirectional one whose two directions are averaged: (B, N, F) → (B, N, hidden)."""

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
