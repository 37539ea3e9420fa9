"""The base of towers, which encode all frames of a video by CLIP's image tower, and choose the text tower.

A new tower is one file beside this one, a settings class and a line in `config/choices/`. It is a subclass of
`FrameTower`; of `FramewiseTower` if it works on CLIP's vectors of the frames, or of `BlockwiseTower` if it works
between the transformer's blocks. docs/extending.md shows a complete one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaclip_finetune.config import ChoiceSettings
from adaclip_finetune.model.clip import encode_images
from adaclip_finetune.model.features import at_least_float32
from adaclip_finetune.model.text import ClipTextTower, TextTower
from adaclip_finetune.model.vit import OpenBlock, VisionView, vision_view


class FrameTower(nn.Module, ABC):
    """Encodes normalised frames (B, T, 3, S, S) to tokens (B, K, D). A mask (B, T) says which frames are real.

    CLIP is not a submodule of its tower, so that its parameters keep their names. A tower's own parameters are new and
    always learn.
    """

    independent: ClassVar[bool] = False
    """True if token k depends on frame k alone. Otherwise selected frames are passed in the order of time."""

    def __init__(self, settings: ChoiceSettings, clip: nn.Module) -> None:
        super().__init__()
        self.settings: Any = settings
        self.checkpointing = False  # whether activations are recomputed in the backward pass
        self._clip = (clip,)  # in a tuple, which hides it from torch's registration of submodules

    @property
    def clip(self) -> nn.Module:
        """The CLIP whose image tower this one uses."""
        return self._clip[0]

    @abstractmethod
    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor: ...

    def frame_shares(self, frames: int) -> Tensor | None:
        """Return how much of each frame is in each token, (K, frames); None if token k is frame k."""
        return None

    def text_tower(self) -> TextTower:
        """Return the text tower that belongs to this tower: CLIP's own, unless a subclass has another."""
        return ClipTextTower(self.clip)


class FramewiseTower(FrameTower):
    """A tower for which CLIP encodes each frame by itself, and `combine` makes the tokens of the vectors.

    Its settings have `framewise` True. Frames that were not selected are then encoded without gradients, and where the
    image tower does not learn, vectors can be kept (`embedding_cache`).
    """

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        return self.combine(at_least_float32(self.encode(self.clip, pixels)), mask)

    @abstractmethod
    def combine(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Return tokens (B, K, D) of the vectors of frames (B, T, D), of which those in `mask` (B, T) are real."""

    @staticmethod
    def encode(clip: nn.Module, pixels: Tensor) -> Tensor:
        """Return the vectors (B, T, D) of frames by any CLIP."""
        return encode_images(clip, pixels.flatten(0, 1)).reshape(*pixels.shape[:2], -1)


class BlockwiseTower(FrameTower):
    """A tower that can act between the blocks of the transformer: `enter`, each `block` in turn, `leave`.

    From block to block it passes a tensor (…, W) of any shape, and `state`, a dictionary for one forward pass. What a
    block writes to `state` must depend on its inputs only, because a block may run again in the backward pass. By
    default each frame is encoded by itself, as the image tower does.
    """

    def __init__(self, settings: ChoiceSettings, clip: nn.Module) -> None:
        super().__init__(settings, clip)
        self._view = (vision_view(clip),)

    @property
    def view(self) -> VisionView:
        """The image tower's parts."""
        return self._view[0]

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        state: dict[str, Any] = {"mask": mask, "shape": pixels.shape[:2]}
        tokens: Tensor = self.view.place(pixels.flatten(0, 1))
        tokens = self.enter(tokens.reshape(*pixels.shape[:2], *tokens.shape[1:]), state)  # (B, T, L, W)
        for number, block in enumerate(self.view.blocks):
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(self.block, number, block, tokens, state, use_reentrant=False)
            else:
                tokens = self.block(number, block, tokens, state)
        return self.leave(tokens, state)

    def enter(self, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the input of the first block from placed tokens (B, T, L, W), which are not normalised yet."""
        return self.view.norm(tokens.flatten(0, 1))

    def block(self, number: int, block: OpenBlock, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        """Run one block of the transformer."""
        return block(tokens)

    def leave(self, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        """Return tokens (B, K, D) in CLIP's embedding space from the output of the last block."""
        pooled: Tensor = self.view.pool(tokens)
        return pooled.reshape(*state["shape"], -1)
