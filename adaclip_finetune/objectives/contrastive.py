"""`objective: contrastive`, the symmetric cross-entropy over a batch (CLIP, Radford et al. 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adaclip_finetune.config import ContrastiveSettings
from adaclip_finetune.model.features import TextFeatures, at_least_float32
from adaclip_finetune.objectives.base import Group, Objective, Rows


class Contrastive(Objective):
    """Classifies each caption's video among those of the batch, and each video's caption."""

    settings_class = ContrastiveSettings

    def loss(self, rows: Rows, group: Group) -> dict[str, Tensor]:
        text = TextFeatures(group.gather(rows["text"]))
        logits = self.retriever.scorer(text, group.gather(rows["video"]))
        return {"contrastive": contrastive_loss(logits, group.same(logits.device))}


def contrastive_loss(logits: Tensor, same: Tensor | None = None) -> Tensor:
    """Return the mean of the cross-entropies over rows and columns of `logits` (B, B), whose diagonal is right.

    `same` (B, B) is True for pairs that are no negatives of each other (`Group.same`): they are left out of the softmax
    instead of counting as wrong. The loss is float32 even under autocast, and float64 for float64 logits.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = at_least_float32(logits)
        targets = torch.arange(len(logits), device=logits.device)
        if same is not None:
            itself = targets[:, None] == targets[None, :]
            logits = logits.masked_fill(same & ~itself, float("-inf"))
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
