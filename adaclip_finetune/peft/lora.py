"""LoRA (Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models"), with DoRA (Liu et al. 2024) and rsLoRA
(Kalajdzievski 2023): W + scale · B·A learns, W does not.

The update is added to the weight itself, by a torch parametrization, and not to a layer's activations. So it works
wherever a weight is used (open_clip's fused attention, timm's trunks, towers that call the blocks themselves), q alone
can learn inside a fused q, k and v, and reading the weight merges it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adaclip_finetune.config.choices.peft import LoraSettings
from adaclip_finetune.model.vit import Linear
from adaclip_finetune.peft.base import PeftMethod, chosen_blocks, train_added

_SHORTEST = 1e-12  # the least length of a row, so that a row of zeros stays zero


class LowRank(nn.Module):
    """Adds scale · B·A to ranges of rows of a weight (out, in). Each range has its own B and A.

    B (rows, rank) is initialised with 0, A (rank, in) at random. `dropout` drops input channels of the update, the same
    ones for a whole batch. With magnitudes (DoRA), each row of the result is scaled to a learned length; its gradient
    treats the row's own length as a constant.
    """

    def __init__(self, weight: Tensor, ranges: Sequence[tuple[int, int]], settings: LoraSettings) -> None:
        super().__init__()
        self.ranges, self.dropout = sorted(ranges), settings.dropout
        alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
        self.scale = alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
        sizes = [stop - start for start, stop in self.ranges]
        self.down = nn.ParameterList(weight.new_empty(settings.rank, weight.shape[1]) for _ in sizes)
        self.up = nn.ParameterList(weight.new_zeros(size, settings.rank) for size in sizes)
        self.magnitude = nn.ParameterList(weight.new_empty(size) for size in sizes if settings.dora)
        for down in self.down:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.reset(weight)

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        """Reset the update of this weight, so that it changes nothing."""
        for up in self.up:
            up.zero_()
        for magnitude, (start, stop) in zip(self.magnitude, self.ranges, strict=False):
            magnitude.copy_(weight[start:stop].norm(dim=1))

    def forward(self, weight: Tensor) -> Tensor:
        # In the weight's precision, without autocast, which meta tensors do not have.
        with nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False):
            pieces, end = [], 0
            for number, (start, stop) in enumerate(self.ranges):
                pieces += [weight[end:start], self._updated(number, weight[start:stop])]
                end = stop
            pieces.append(weight[end:])
            return torch.cat([piece for piece in pieces if len(piece)])

    def _updated(self, number: int, rows: Tensor) -> Tensor:
        down: Tensor = self.down[number]
        if self.training and self.dropout:
            down = down * F.dropout(down.new_ones(down.shape[1]), self.dropout)
        rows = torch.addmm(rows, self.up[number], down, alpha=self.scale)
        if not len(self.magnitude):
            return rows
        factor: Tensor = self.magnitude[number] / rows.detach().norm(dim=1).clamp(min=_SHORTEST)
        return rows * factor[:, None]


class Lora(PeftMethod):
    """Trains low-rank updates of `targets` in the chosen towers and blocks, and the parameters of CLIP that
    `keep_module_keywords` name."""

    settings: LoraSettings

    def attach(self, clip: nn.Module) -> None:
        # q, k and v may be rows of one weight, which then gets one update.
        by_weight: dict[tuple[nn.Module, str], list[tuple[int, int]]] = {}
        for linear in self._targets(clip):
            by_weight.setdefault((linear.module, linear.weight), []).append((linear.start, linear.stop))
        for (module, name), ranges in by_weight.items():
            weight = getattr(module, name).detach()
            parametrize.register_parametrization(module, name, LowRank(weight, ranges, self.settings))

    def reset(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, parametrize.ParametrizationList):
                weight = module.original
                assert isinstance(weight, Tensor)
                for update in module:
                    if isinstance(update, LowRank):
                        update.reset(weight)

    def choose(self, model: nn.Module) -> None:
        train_added(model, LowRank, self.settings.keep_module_keywords)

    def _targets(self, clip: nn.Module) -> list[Linear]:
        """Return the linear maps to update. Raise UserError for a tower or a block that does not exist."""
        blocks = chosen_blocks(clip, "lora", self.settings.towers, self.settings.layers)
        return [
            linear
            for found in blocks.values()
            for block in found
            for role in dict.fromkeys(self.settings.targets)
            for linear in block.linears()[role]
        ]
