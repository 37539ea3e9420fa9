"""The contrastive loss of a batch of captions and videos (CLIP, Radford et al. 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(similarity: Tensor, video_groups: Tensor | None = None) -> Tensor:
    """Mean of the cross-entropies over rows and over columns of `similarity` (B, B), whose diagonal is right: a scalar.

    `video_groups` (B,) numbers the videos: where two entries of the batch share one, each is right for both, and so the
    other is left out of the softmax instead of counting as wrong. Float32 outside autocast; float64 stays float64.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"a batch's similarity is square (B, B), not {tuple(similarity.shape)}")
    with torch.autocast(similarity.device.type, enabled=False):
        logits = similarity if similarity.dtype == torch.float64 else similarity.float()
        targets = torch.arange(len(logits), device=logits.device)
        if video_groups is not None:
            same_video = video_groups[:, None] == video_groups[None, :]
            itself = targets[:, None] == targets[None, :]
            logits = logits.masked_fill(same_video & ~itself, float("-inf"))
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
