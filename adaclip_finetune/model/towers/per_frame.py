"""`tower: per_frame`: CLIP's image tower encodes each frame by itself."""

from __future__ import annotations

from torch import Tensor, nn

from adaclip_finetune.model.clip import encode_images
from adaclip_finetune.model.towers.base import FrameTower


class PerFrame(FrameTower):
    """Encodes frames (B, T, 3, S, S) to one token each: (B, T, D)."""

    independent = True

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        return self.encode(self.clip, pixels)

    @staticmethod
    def encode(clip: nn.Module, pixels: Tensor) -> Tensor:
        """Return the embeddings (B, T, D) of frames by any CLIP."""
        return encode_images(clip, pixels.flatten(0, 1)).reshape(*pixels.shape[:2], -1)
