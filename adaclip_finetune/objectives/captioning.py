"""`objective: captioning`: a mapper learns the prefix with which a frozen language model says a video's caption.

Retriever and language model are frozen. ClipCap (Mokady et al. 2021) learns from vectors of images, here of videos;
CapDec (Nukrai et al. 2022, "Text-Only Training for Image Captioning using Noise-Injected CLIP") from the captions' own
text vectors, to which noise is added since texts and videos lie apart in CLIP's space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaclip_finetune.config import ChoiceSettings, Config
from adaclip_finetune.config.choices.objectives import CaptionLossSettings
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.data.sampling import generator
from adaclip_finetune.model.captioner import Captioner
from adaclip_finetune.model.features import at_least_float32
from adaclip_finetune.model.language_model import Tokens
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.objectives.base import Group, Objective, Opened, Rows
from adaclip_finetune.weights.loaded import LoadedClip


class CaptionLoss(Objective):
    """The mean cross-entropy over the tokens of the captions of a batch, their ends included.

    A row of a part of the batch is the sum over the tokens of one caption, so that gradient caching bounds the memory
    that the language model takes.
    """

    settings_class = CaptionLossSettings
    settings: CaptionLossSettings

    def __init__(self, settings: ChoiceSettings, retriever: VideoRetriever) -> None:
        super().__init__(settings, retriever)
        assert retriever.captioner is not None, "the settings refuse this"

    @property
    def captioner(self) -> Captioner:
        """The captioner of the retriever, the only part that learns."""
        captioner = self.retriever.captioner
        assert captioner is not None
        return captioner

    def choose(self) -> None:
        self.retriever.requires_grad_(False)
        self.captioner.requires_grad_(True)

    def start(self, config: Config, loaded: LoadedClip, open_other: Callable[[str], Opened]) -> None:
        if self.retriever.device.type != "meta":
            self.captioner.language_model()

    def frozen_weights(self) -> Iterable[Tensor]:
        weights: Iterable[Tensor] = self.captioner.language_model().module.parameters()
        return weights

    def train(self, mode: bool = True) -> CaptionLoss:
        """Set the mode of the captioner; the retriever stays in evaluation mode and chooses frames as it does there."""
        super().train(False)
        self.training = mode
        self.captioner.train(mode)
        return self

    def embed(self, batch: TrainBatch) -> Rows:
        """Return the sum of the cross-entropies of each caption's tokens, `losses` (B,)."""
        with torch.no_grad():
            vectors = self._of_videos(batch) if self.settings.uses_videos else self._of_texts(batch)
        tokens = self._tokens(batch)
        losses = self.captioner.language_model().losses(self.captioner(vectors), tokens)
        return {"losses": losses.sum(dim=1)}

    def embed_fixed(self, batch: TrainBatch) -> Rows:
        """Return the number of tokens of each caption, `tokens` (B,)."""
        return {"tokens": self._tokens(batch).mask.sum(dim=1)}

    def loss(self, rows: Rows, group: Group) -> dict[str, Tensor]:
        return {"captioning": group.gather(rows["losses"]).sum() / group.gather(rows["tokens"]).sum()}

    def _tokens(self, batch: TrainBatch) -> Tokens:
        """Return the tokens of the captions; a share without videos has one blank caption."""
        tokens = self.captioner.language_model().tokenize(batch.captions or [""], self.captioner.settings.max_tokens)
        return Tokens(*(tensor.to(self.retriever.device) for tensor in tokens))

    def _of_videos(self, batch: TrainBatch) -> Tensor:
        return self.captioner.inputs(self.retriever.encode_video(batch.videos))

    def _of_texts(self, batch: TrainBatch) -> Tensor:
        vectors = at_least_float32(self.retriever.encode_text(batch.token_ids).sentence)
        drawn = gaussian(batch.noise, vectors.shape[1]).to(vectors)
        return with_noise(vectors, drawn, self.settings.noise_variance)[:, None]


def with_noise(vectors: Tensor, drawn: Tensor, variance: float) -> Tensor:
    """Return unit vectors (B, D): those of `vectors`, plus `drawn` from N(0, 1) times the root of the variance."""
    with torch.autocast(vectors.device.type, enabled=False):
        return F.normalize(F.normalize(vectors, dim=-1) + variance**0.5 * drawn, dim=-1)


def gaussian(noise: Tensor, width: int) -> Tensor:
    """Return values from N(0, 1), float32 (B, width), drawn by generators that the rows of `noise` (B, N) seed.

    The noise of a batch is a function of (seed, epoch, entry), and so these values are.
    """
    seeds = [int.from_bytes(row.tobytes(), "little") for row in np.asarray(noise.cpu(), np.float32)]
    drawn: Any = [generator("text noise", seed, 0).standard_normal(width, np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(drawn))
