"""What a tower is: all frames of a video through CLIP's image tower together, and the text tower that belongs to it.

A new tower is one file beside this one: a subclass of `FrameTower`, or of `BlockwiseTower` if it works between the
transformer's blocks, a settings class and a line in `config/choices.py`. docs/extending.md shows a complete one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaclip_finetune.config import ChoiceSettings
from adaclip_finetune.model.text import ClipTextTower, TextTower
from adaclip_finetune.model.vit import Block, VisionView, vision_view


class FrameTower(nn.Module, ABC):
    """Normalised frames (B, T, 3, S, S) and which of them are real, bool (B, T) → tokens (B, K, D).

    CLIP is not a submodule of its tower, so that its parameters keep their names; a tower's own parameters are new and
    always learn.
    """

    independent: ClassVar[bool] = False
    """True if token k depends on frame k alone: then frames that were not chosen need not be encoded with gradients."""

    def __init__(self, settings: ChoiceSettings, clip: nn.Module) -> None:
        super().__init__()
        self.settings: Any = settings
        self.checkpointing = False  # whether activations are made anew in the backward pass
        self._clip = (clip,)  # in a tuple, which hides it from torch's registration of submodules

    @property
    def clip(self) -> nn.Module:
        """The CLIP whose image tower this one uses."""
        return self._clip[0]

    @abstractmethod
    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor: ...

    def frame_shares(self, frames: int) -> Tensor | None:
        """How much of each of `frames` frames is in each token, (K, frames); None: token k is frame k."""
        return None

    def text_tower(self) -> TextTower:
        """The text tower that belongs to this tower: CLIP's own, unless a tower says otherwise."""
        return ClipTextTower(self.clip)


class BlockwiseTower(FrameTower):
    """A tower that is opened between its blocks: `enter`, each `block` in turn, `leave`.

    What it passes from block to block is one tensor (…, W) whose shape is the tower's own business, and `state`, a
    dictionary of one forward pass; what a block puts there must follow from its inputs, since a block may run again in
    the backward pass. By default it does what the image tower itself does to each frame alone.
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
        tokens: Tensor = self.view.embed(pixels.flatten(0, 1))
        tokens = self.enter(tokens.reshape(*pixels.shape[:2], *tokens.shape[1:]), state)  # (B, T, L, W)
        for number, block in enumerate(self.view.blocks):
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(self.block, number, block, tokens, state, use_reentrant=False)
            else:
                tokens = self.block(number, block, tokens, state)
        return self.leave(tokens, state)

    def enter(self, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        """Embedded patches (B, T, L, W) → what the first block takes."""
        return tokens.flatten(0, 1)

    def block(self, number: int, block: Block, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        """One block of the transformer."""
        return block(tokens)

    def leave(self, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        """What the last block gave → tokens (B, K, D) in CLIP's embedding space."""
        pooled: Tensor = self.view.pool(tokens)
        return pooled.reshape(*state["shape"], -1)
