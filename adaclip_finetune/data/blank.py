"""Videos without a picture, in the shapes of real ones: to try a batch out, or to stand in where there is nothing."""

from __future__ import annotations

import torch

from adaclip_finetune.config import Config
from adaclip_finetune.data.dataset import VideoBatch
from adaclip_finetune.data.preprocess import IMAGENET, ImageSpec


def blank_videos(config: Config, image: ImageSpec, count: int) -> VideoBatch:
    """`count` videos of num_frm zero frames each, all named differently, on the CPU."""
    rows = (count, config.num_frm)
    return VideoBatch(
        frames=torch.zeros(*rows, 3, image.size, image.size, dtype=torch.uint8),
        frame_mask=torch.zeros(rows, dtype=torch.bool),
        policy_frames=_blank_policy_frames(config, rows),
        frame_indices=torch.full(rows, -1),
        video_ids=[f"blank {number}" for number in range(count)],
    )


def _blank_policy_frames(config: Config, rows: tuple[int, int]) -> torch.Tensor | None:
    """What `VideoReader` gives the policy backbone."""
    if not config.use_policy or config.policy_backbone in ("clip", "frozen_clip"):
        return None
    raw = config.policy_backbone == "raw"
    channels, size = (1, config.rescale_size) if raw else (3, IMAGENET.size)
    return torch.zeros(*rows, channels, size, size, dtype=torch.uint8)
