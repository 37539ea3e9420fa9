"""Prompts: tokens that are learned enter CLIP's blocks beside those of the input (VPT, Jia et al. 2022, "Visual Prompt
Tuning"; CoOp, Zhou et al. 2022, "Learning to Prompt for Vision-Language Models").

They stand behind the class token of an image and behind the start token of a text, and are removed after the last
block. So the tokens of the input keep their positions: a text may be as long as without prompts, and its end token is
found where it was. The outputs differ from the pretrained ones from the start.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from adaclip_finetune.config.choices.peft import PromptSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.vit import TowerName, make_room, tokens_before, tower_blocks
from adaclip_finetune.peft.base import PeftMethod, train_added
from adaclip_finetune.weights.plain import Added


class BlockPrompts(Added):
    """The prompts of one block, (count, width), at position `at`: they are inserted before the first block, and replace
    those of the block before it in the others. Blocks beyond `depth` have none and pass on what they get."""

    def __init__(self, block: nn.Module, at: int, count: int, width: int, number: int, depth: int) -> None:
        super().__init__()
        self.at, self.count, self.is_first = at, count, number == 0
        self.signature = inspect.signature(block.forward)
        self.tokens = nn.Parameter(torch.empty(count, width)) if number < depth else None
        if self.tokens is not None:
            nn.init.normal_(self.tokens, std=0.02)

    def enter(self, block: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the arguments of the block with the prompts among the tokens (n, L, width): a forward hook."""
        bound = self.signature.bind(*args, **given)
        name = next(iter(bound.arguments))
        x: Tensor = bound.arguments[name]
        if self.tokens is not None:
            behind = self.at if self.is_first else self.at + self.count
            prompts = self.tokens.to(x.dtype).expand(len(x), -1, -1)
            bound.arguments[name] = torch.cat([x[:, : self.at], prompts, x[:, behind:]], dim=1)
        make_room(bound.arguments, self.at, self.count)
        return bound.args, bound.kwargs

    def leave(self, block: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Return the output of the last block without the prompts: a forward hook."""
        return torch.cat([out[:, : self.at], out[:, self.at + self.count :]], dim=1)


class Prompting(PeftMethod):
    """Trains the prompts, and the parameters that `keep_module_keywords` name."""

    settings: PromptSettings
    mergeable = False
    keeps_outputs = False

    def attach(self, clip: nn.Module) -> None:
        self._attach(clip, "image", self.settings.num_visual_prompts)
        self._attach(clip, "text", self.settings.num_text_prompts)

    def choose(self, model: nn.Module) -> None:
        train_added(model, BlockPrompts, self.settings.keep_module_keywords)

    def _attach(self, clip: nn.Module, tower: TowerName, count: int) -> None:
        if not count:
            return
        try:
            blocks, at = tower_blocks(clip, tower), tokens_before(clip, tower)
        except UserError as error:
            setting = "num_visual_prompts" if tower == "image" else "num_text_prompts"
            raise UserError(f"peft prompt: {error}; set peft.config.{setting} to 0, or take peft bitfit") from error
        depth = self.settings.depth
        if depth > len(blocks):
            raise UserError(f"peft.config.depth {depth}: the {tower} tower has only {len(blocks)} blocks")
        for number, block in enumerate(blocks):
            weight = block.linears()["out"][0].rows()
            prompts = BlockPrompts(block.module, at, count, len(weight), number, depth).to(weight)
            block.module.add_module("prompts", prompts)
            block.module.register_forward_pre_hook(prompts.enter, with_kwargs=True)
            if number + 1 == len(blocks):
                block.module.register_forward_hook(prompts.leave)
