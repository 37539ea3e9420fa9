"""`tower: per_frame`: CLIP's image tower encodes each frame by itself."""

from __future__ import annotations

from torch import Tensor

from adaclip_finetune.model.towers.base import FramewiseTower


class PerFrame(FramewiseTower):
    """Encodes frames (B, T, 3, S, S) to one token each: (B, T, D)."""

    independent = True

    def combine(self, frames: Tensor, mask: Tensor) -> Tensor:
        return frames
