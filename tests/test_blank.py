"""Blank videos have the shapes and types of those that are read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from adaclip_finetune.config import load_config
from adaclip_finetune.data.blank import blank_videos
from adaclip_finetune.data.dataset import VideoReader, collate
from adaclip_finetune.data.preprocess import ImageSpec

IMAGE = ImageSpec(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Grey:
    """A store of one grey video."""

    root = Path()

    def count(self, video_id: str) -> int:
        return 20

    def read(self, video_id: str, indices: list[int]) -> NDArray[np.uint8]:
        return np.full((len(indices), 40, 36, 3), 128, np.uint8)


@pytest.mark.parametrize("settings", [
    {},
    {"policy_backbone": "raw", "rescale_size": 8},
    {"policy_backbone": "clip"},
    {"policy_backbone": "frozen_clip"},
    {"use_policy": False},
    {"num_frm": 3, "top_k": 2},
])  # fmt: skip
def test_blank_videos_are_shaped_like_read_ones(settings: dict[str, Any]) -> None:
    config = load_config(None, settings)
    reader = VideoReader(Grey(), config, IMAGE)  # type: ignore[arg-type]
    read = collate([reader.read("a"), reader.read("b")]).videos
    blank = blank_videos(config, IMAGE, 2)
    assert read is not None and len(blank) == len(set(blank.video_ids)) == 2
    for name in ("frames", "frame_mask", "frame_indices", "policy_frames"):
        one, other = getattr(blank, name), getattr(read, name)
        if other is None:
            assert one is None
        else:
            assert (one.shape, one.dtype) == (other.shape, other.dtype), name
    assert not blank.frame_mask.any()
    assert torch.equal(blank.frame_mask, blank.frame_indices >= 0)
