"""Shared fixtures: where ../shared is, and a CLIP of two blocks a tower that builds in milliseconds."""

from pathlib import Path

import open_clip
import pytest
import torch

# The tensors are tiny: more threads would only wait for each other.
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference facts and real data beside the checkout; tests that need it skip where it is not."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: golden values and real data are not part of the project")
    return SHARED


def build_tiny_clip(seed: int = 0) -> open_clip.CLIP:
    """Two blocks of width 64 a tower, 32-pixel images in patches of 16, embedding 64, CLIP's vocabulary, random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_clip.CLIP(
            embed_dim=64,
            vision_cfg={"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64},
            text_cfg={"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
            quick_gelu=True,
        )


@pytest.fixture
def tiny_clip() -> open_clip.CLIP:
    """See `build_tiny_clip`."""
    return build_tiny_clip()
