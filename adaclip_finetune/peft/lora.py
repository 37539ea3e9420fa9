"""LoRA (Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models"), with DoRA (Liu et al. 2024) and rsLoRA
(Kalajdzievski 2023): W + scale · B·A learns, W does not.

The update lies over the weight itself, as a torch parametrization, and not over a layer's activations. So it works
wherever a weight is used (open_clip's fused attention, timm's trunks, towers that call the blocks themselves), q alone
can learn inside a fused q, k and v, and merging is reading the weight.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adaclip_finetune.config import LoraSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.vit import Linear, text_linears, vision_linears
from adaclip_finetune.peft.base import PeftMethod, clip_of, holds_keyword, learning, warn_of_idle_keywords


class LowRank(nn.Module):
    """Adds scale · B·A to rows start…stop of a weight (out, in); B (rows, rank) begins at 0, A (rank, in) at random.

    `dropout` leaves out input channels of the update, the same ones for all rows of a batch: over a weight there is no
    activation to drop. With `magnitude` (DoRA) each row of the result is scaled to a learned length, whose gradient
    takes the row's own length as a constant.
    """

    magnitude: nn.Parameter | None

    def __init__(self, weight: Tensor, linear: Linear, settings: LoraSettings) -> None:
        super().__init__()
        self.start, self.stop, self.dropout = linear.start, linear.stop, settings.dropout
        alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
        self.scale = alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
        self.down = nn.Parameter(weight.new_empty(settings.rank, weight.shape[1]))
        self.up = nn.Parameter(weight.new_zeros(self.stop - self.start, settings.rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.magnitude = nn.Parameter(weight.new_empty(self.stop - self.start)) if settings.dora else None
        self.reset(weight)

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        """Make the update of this weight change nothing."""
        self.up.zero_()
        if self.magnitude is not None:
            self.magnitude.copy_(weight[self.start : self.stop].norm(dim=1))

    def forward(self, weight: Tensor) -> Tensor:
        # In the precision of the weight, which autocast would round before it is added to.
        with torch.autocast(weight.device.type, enabled=False):
            down: Tensor = self.down
            if self.training and self.dropout:
                down = down * F.dropout(down.new_ones(down.shape[1]), self.dropout)
            rows = weight[self.start : self.stop] + self.scale * (self.up @ down)
            if self.magnitude is not None:
                rows = rows * (self.magnitude / rows.detach().norm(dim=1))[:, None]
            if len(rows) == len(weight):
                return rows
            return torch.cat([weight[: self.start], rows, weight[self.stop :]])


class Lora(PeftMethod):
    """Low-rank updates of `targets` in the chosen towers and blocks learn, and of CLIP's own parameters those that
    `keep_module_keywords` name."""

    settings: LoraSettings

    def attach(self, clip: nn.Module) -> None:
        for linear in self._targets(clip):
            weight = getattr(linear.module, linear.weight)
            parametrize.register_parametrization(
                linear.module, linear.weight, LowRank(weight.detach(), linear, self.settings)
            )

    def reset(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, parametrize.ParametrizationList):
                weight = module.original
                assert isinstance(weight, Tensor)
                for update in module:
                    if isinstance(update, LowRank):
                        update.reset(weight)

    def choose(self, model: nn.Module) -> None:
        clip = clip_of(model)
        keywords = self.settings.keep_module_keywords
        warn_of_idle_keywords(clip, keywords)
        added = {
            id(parameter)
            for module in clip.modules()
            if isinstance(module, LowRank)
            for parameter in module.parameters()
        }
        for name, parameter in learning(clip):
            parameter.requires_grad_(id(parameter) in added or holds_keyword(name, keywords))

    def _targets(self, clip: nn.Module) -> list[Linear]:
        """The linear maps to update. Raises UserError for a tower or a block that is not there."""
        settings, found = self.settings, []
        towers = {"image": vision_linears, "text": text_linears}
        for name in towers if settings.towers == "both" else [settings.towers]:
            try:
                blocks = towers[name](clip)
            except UserError as error:
                other = "text" if name == "image" else "image"
                raise UserError(
                    f"peft lora: {error}; set peft.config.towers to {other}, or take peft bitfit or full"
                ) from error
            if beyond := [number for number in settings.layers if number >= len(blocks)]:
                raise UserError(
                    f"peft.config.layers names block {beyond[0]}, but the {name} tower has blocks 0 to "
                    f"{len(blocks) - 1}"
                )
            chosen = [block for number, block in enumerate(blocks) if not settings.layers or number in settings.layers]
            found += [linear for block in chosen for role in settings.targets for linear in block[role]]
        return found
