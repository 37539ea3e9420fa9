"""Adapters: a small bottleneck network in each block learns, the block does not.

Sequential adapters follow the MLP (Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP"); parallel ones
stand beside it and get the same input (AdaptFormer, Chen et al. 2022). What they compute is not linear, so it cannot be
merged into CLIP's weights.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from adaclip_finetune.config.choices.peft import AdapterSettings
from adaclip_finetune.peft.base import PeftMethod, chosen_blocks, train_added
from adaclip_finetune.weights.plain import Added


class Adapter(Added):
    """Computes scale · up(gelu(down(x))), which is 0 at the start.

    The output of the MLP includes it wherever a block is called, as a whole or in parts.
    """

    def __init__(self, weight: Tensor, settings: AdapterSettings) -> None:
        """`weight` is that of the MLP's last layer, (width, …), whose device and precision the adapter gets."""
        super().__init__()
        self.scale = settings.scale or (0.1 if settings.position == "parallel" else 1.0)
        self.down = nn.Linear(len(weight), settings.dim).to(weight)
        self.up = nn.Linear(settings.dim, len(weight)).to(weight)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(F.gelu(self.down(x)))
        return self.scale * out


class Adapters(PeftMethod):
    """Trains an adapter in each chosen block, and the parameters that `keep_module_keywords` name."""

    settings: AdapterSettings
    mergeable = False

    def attach(self, clip: nn.Module) -> None:
        for blocks in chosen_blocks(clip, "adapter", self.settings.towers, self.settings.layers).values():
            for block in blocks:
                adapter = Adapter(block.linears()["proj"][0].rows(), self.settings)
                # Not a part of the MLP, which may be a Sequential and would call it.
                block.module.add_module("adapter", adapter)
                block.add_to_mlp(adapter, self.settings.position == "parallel")

    def choose(self, model: nn.Module) -> None:
        train_added(model, Adapter, self.settings.keep_module_keywords)
