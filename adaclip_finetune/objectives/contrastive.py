"""`objective: contrastive`, the symmetric cross-entropy over a batch (CLIP, Radford et al. 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adaclip_finetune.config import ContrastiveSettings
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.model.features import at_least_float32
from adaclip_finetune.objectives.base import Group, Objective


class Contrastive(Objective):
    """Classifies each caption's video among those of the batch, and each video's caption."""

    settings_class = ContrastiveSettings

    def forward(self, batch: TrainBatch, group: Group) -> dict[str, Tensor]:
        text, videos = self.retriever(batch)
        scorer = self.retriever.scorer
        text = text._replace(sentence=group.gather(text.sentence))
        logits = scorer(text, group.gather(scorer.keep(videos)))
        return {"contrastive": contrastive_loss(logits, group.videos(logits.device))}


def contrastive_loss(logits: Tensor, videos: Tensor | None = None) -> Tensor:
    """Return the mean of the cross-entropies over rows and columns of `logits` (B, B), whose diagonal is right.

    `videos` (B,) numbers the videos. If two pairs of the batch have the same video, the other pair is left out of the
    softmax instead of counting as wrong. The loss is float32 even under autocast, and float64 for float64 logits.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = at_least_float32(logits)
        targets = torch.arange(len(logits), device=logits.device)
        if videos is not None:
            itself = targets[:, None] == targets[None, :]
            logits = logits.masked_fill((videos[:, None] == videos[None, :]) & ~itself, float("-inf"))
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
