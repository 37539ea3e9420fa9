"""`tower: per_frame`, CLIP as it is: each frame alone through the image tower, a token a frame."""

from __future__ import annotations

from torch import Tensor, nn

from adaclip_finetune.model.clip import encode_images
from adaclip_finetune.model.towers.base import FrameTower


class PerFrame(FrameTower):
    """(B, T, 3, S, S) → (B, T, D), an embedding a frame."""

    independent = True

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        return self.encode(self.clip, pixels)

    @staticmethod
    def encode(clip: nn.Module, pixels: Tensor) -> Tensor:
        """The same for any CLIP."""
        return encode_images(clip, pixels.flatten(0, 1)).reshape(*pixels.shape[:2], -1)
