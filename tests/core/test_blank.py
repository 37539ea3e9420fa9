"""Blank videos have the shapes and types of real ones."""

from typing import Any

import numpy as np
import pytest
from conftest import build_tiny_clip
from numpy.typing import NDArray

from adaclip_finetune.config import load_config
from adaclip_finetune.data.blank import blank_videos
from adaclip_finetune.data.dataset import VideoReader, collate
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.weights.loaded import LoadedClip

CLIP = LoadedClip(build_tiny_clip(), ImageSpec(32, (0.5,) * 3, (0.25,) * 3), None, None, 77, "test")  # type: ignore[arg-type]


class Grey:
    """A store of grey videos."""

    def times(self, video_id: str) -> None:
        return None

    def count(self, video_id: str) -> int:
        return 20

    def read(self, video_id: str, indices: list[int]) -> NDArray[np.uint8]:
        return np.full((len(indices), 40, 36, 3), 128, np.uint8)


@pytest.mark.parametrize(
    "settings",
    [
        {"policy_backbone": "raw", "rescale_size": 8},
        {"policy_backbone": "mobilenet_v2"},
        {"policy_backbone": "frozen_clip", "num_frm": 3, "top_k": 2},
        {"use_policy": False},
    ],
)
def test_blank_videos_are_shaped_like_read_ones(settings: dict[str, Any]) -> None:
    config = load_config(None, {"policy_weights": "random", **settings})
    views = VideoRetriever(config, CLIP).views()
    reader = VideoReader(Grey(), config, views)  # type: ignore[arg-type]
    read, blank = collate([reader.read("a"), reader.read("b")]).videos, blank_videos(config.num_frm, views, 2)
    assert len(blank) == len(set(blank.video_ids)) == 2 and not blank.frame_mask.any()
    for name in ("frames", "frame_mask", "frame_indices", "policy_frames"):
        one, other = getattr(blank, name), getattr(read, name)
        assert (one is None) == (other is None)
        assert one is None or (one.shape, one.dtype) == (other.shape, other.dtype), name
