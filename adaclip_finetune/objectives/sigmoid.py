"""`objective: sigmoid`, a binary classification of every pair (SigLIP, Zhai et al. 2023, "Sigmoid Loss for Language
Image Pre-Training")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adaclip_finetune.config import ChoiceSettings, SigmoidSettings
from adaclip_finetune.model.features import TextFeatures, at_least_float32
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.objectives.base import Group, Objective, Rows
from adaclip_finetune.weights.loaded import ensure_logit_bias, has_new_logit_bias


class Sigmoid(Objective):
    """Classifies each pair of a caption and a video of the batch as right or wrong.

    It uses the tower's own `logit_bias`, and creates it for a CLIP that has none.
    """

    settings_class = SigmoidSettings

    def __init__(self, settings: ChoiceSettings, retriever: VideoRetriever) -> None:
        super().__init__(settings, retriever)
        ensure_logit_bias(retriever.clip)

    def choose(self) -> None:
        if has_new_logit_bias(self.retriever.clip):
            self.retriever.clip.get_parameter("logit_bias").requires_grad_(True)

    def loss(self, rows: Rows, group: Group) -> dict[str, Tensor]:
        scorer, own = self.retriever.scorer, group.here
        kept = group.gather(rows["video"])
        same = group.same(kept.device)
        mine = TextFeatures(rows["text"][: group.own])
        # This process's captions are compared with one process's videos at a time, so no process holds all pairs.
        total = kept.new_zeros(())
        start = 0
        for size in group.sizes:
            columns = slice(start, start + size)
            total = total + sigmoid_loss(scorer(mine, kept[columns]), own.start - start, same[own, columns])
            start += size
        return {"sigmoid": group.share_of_sum(total / len(group))}


def sigmoid_loss(logits: Tensor, offset: int, same: Tensor) -> Tensor:
    """Return the sum over pairs of −log sigmoid(±logits) for `logits` (t, v); + if text i belongs to video i + offset.

    Other pairs for which `same` (t, v) is True (`Group.same`) are neither right nor wrong, and are left out.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = at_least_float32(logits)
        rows = torch.arange(logits.shape[0], device=logits.device)[:, None]
        columns = torch.arange(logits.shape[1], device=logits.device)[None, :]
        right = columns == rows + offset
        counted = right | ~same
        losses = -F.logsigmoid(torch.where(right, logits, -logits))
        return (losses * counted).sum()
