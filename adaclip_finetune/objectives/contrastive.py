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
    settings: ContrastiveSettings

    def loss(self, rows: Rows, group: Group) -> dict[str, Tensor]:
        settings, text = self.settings, group.gather(rows["text"])
        logits = self.retriever.scorer(TextFeatures(text), group.gather(rows["video"]))
        left_out = group.same(logits.device)
        if settings.hard_negatives:
            left_out = all_but_hardest(text, left_out, settings.hard_negatives)
        return {"contrastive": contrastive_loss(logits, left_out, settings.dual_softmax, settings.label_smoothing)}


def contrastive_loss(
    logits: Tensor, left_out: Tensor | None = None, dual_softmax: bool = False, label_smoothing: float = 0.0
) -> Tensor:
    """Return the mean of the cross-entropies over rows and columns of `logits` (B, B), whose diagonal is right.

    `left_out` (B, B) is True in row i at the pairs with which pair i is not contrasted, such as those that are no
    negatives of it (`Group.same`). With `dual_softmax` each logit of a text and a video is first multiplied by the
    softmax over the other direction: by the share of the text among all texts, where videos are classified (CAMoE,
    Cheng et al. 2021). The loss is float32 even under autocast, and float64 for float64 logits.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = at_least_float32(logits)
        right = torch.arange(len(logits), device=logits.device)
        left_out = torch.zeros_like(logits, dtype=torch.bool) if left_out is None else left_out
        losses = []
        for way in (logits, logits.T):
            if dual_softmax:
                way = way * contrasted(way, right, left_out).softmax(dim=0)
            losses.append(cross_entropy(way, right, left_out, label_smoothing))
        return (losses[0] + losses[1]) / 2


def cross_entropy(logits: Tensor, right: Tensor, left_out: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of the rows of `logits` (n, m) with the targets `right` (n,), 0 without rows.

    Entries that are True in `left_out` (n, m) are left out of the softmax unless they are targets. `label_smoothing`
    is the share of the target that is spread evenly over all entries of a row that are not left out.
    """
    logits = contrasted(logits, right, left_out)
    losses = F.cross_entropy(logits, right, reduction="none")
    if label_smoothing:
        counted = logits.isfinite()
        mean = logits.masked_fill(~counted, 0).sum(dim=1) / counted.sum(dim=1)
        losses = torch.lerp(losses, logits.logsumexp(dim=1) - mean, label_smoothing)
    return losses.sum() / max(len(losses), 1)


def contrasted(logits: Tensor, right: Tensor, left_out: Tensor) -> Tensor:
    """Return `logits` (n, m) with -inf at the entries that are left out and are not the targets `right` (n,)."""
    return logits.masked_fill(left_out.scatter(1, right[:, None], False), -torch.inf)


def all_but_hardest(text: Tensor, same: Tensor, count: int) -> Tensor:
    """Return `same` (B, B) with True also at all but the `count` hardest negatives of each row.

    The hardest negatives of a pair are those whose text vector (B, D) has the largest cosine with its own.
    """
    with torch.autocast(text.device.type, enabled=False), torch.no_grad():
        unit = F.normalize(text, dim=-1)
        likeness = (unit @ unit.T).masked_fill(same, -torch.inf)
        hardest = likeness.topk(min(count, len(text)), dim=1).indices
        return same | torch.ones_like(same).scatter(1, hardest, False)
