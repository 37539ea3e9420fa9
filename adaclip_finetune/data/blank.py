"""Blank videos in the shapes of real ones: for trial steps, and for shares of a batch that are empty."""

from __future__ import annotations

import torch
from torch import Tensor

from adaclip_finetune.data.dataset import VideoBatch
from adaclip_finetune.data.preprocess import ImageSpec, Views


def blank_videos(num_frm: int, views: Views, count: int) -> VideoBatch:
    """Return `count` videos of num_frm zero frames each, with different names, on the CPU."""
    rows = (count, num_frm)
    return VideoBatch(
        frames=_zeros(rows, views.clip),
        frame_mask=torch.zeros(rows, dtype=torch.bool),
        policy_frames=None if views.selector is None else _zeros(rows, views.selector),
        frame_indices=torch.full(rows, -1),
        video_ids=[f"blank {number}" for number in range(count)],
    )


def _zeros(rows: tuple[int, int], view: ImageSpec) -> Tensor:
    return torch.zeros(*rows, view.channels, view.size, view.size, dtype=torch.uint8)
