"""SSF (Lian et al. 2022, "Scaling & Shifting Your Features"): each output channel y of a layer becomes γ·y + β.

A linear layer or convolution computes y = W·x + b, so that γ·y + β is the layer with the weight γ·W and the bias
γ·b + β; likewise for a norm. γ and β therefore are torch parametrizations of weights and biases, and reading these
merges them.

A layer without a bias has no place for β. It gets γ alone: the patches of open_clip's own image towers, norms and
projections that were built without bias, and q and v of EVA-01, whose biases belong to another module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adaclip_finetune.config.choices.peft import SsfSettings
from adaclip_finetune.model.vit import ROLES, layer_norms, patch_embedding, tower_norms
from adaclip_finetune.peft.base import PeftMethod, chosen_blocks, train_added

Rows = list[int]


class Scale(nn.Module):
    """Multiplies rows of a weight by γ. The learned tensor is γ − 1, so that weight decay pulls γ to 1."""

    def __init__(self, weight: Tensor, rows: Rows) -> None:
        super().__init__()
        self.register_buffer("rows", torch.tensor(rows, device=weight.device), persistent=False)
        self.scale = nn.Parameter(weight.new_zeros(len(rows)))

    def factors(self, weight: Tensor) -> Tensor:
        """Return γ of each row of the weight, 1 where nothing is learned."""
        return weight.new_ones(len(weight)).index_add(0, self.get_buffer("rows"), self.scale)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factors(weight).reshape(-1, *[1] * (weight.dim() - 1))


class Shift(nn.Module):
    """Turns a bias b into γ·b + β, with the γ of the weight of the same layer."""

    def __init__(self, bias: Tensor, scale: Scale) -> None:
        super().__init__()
        self._scale = (scale,)  # in a tuple, which hides it from torch: γ is a parameter of the weight's `Scale`
        self.shift = nn.Parameter(torch.zeros_like(scale.scale, dtype=bias.dtype))

    def forward(self, bias: Tensor) -> Tensor:
        (scale,) = self._scale
        return (bias * scale.factors(bias)).index_add(0, scale.get_buffer("rows"), self.shift)


class ScaleAndShift(PeftMethod):
    """Trains γ and β behind the layers that `where` names, and the parameters that `keep_module_keywords` name.

    Norms and patches outside of the blocks are included unless `layers` names blocks. `freeze_layer_num` freezes γ and
    β with the layers that they belong to, so that 0 freezes those of the patches.
    """

    settings: SsfSettings

    def attach(self, clip: nn.Module) -> None:
        rows: dict[tuple[nn.Module, str, str | None], set[int]] = {}
        for module, weight, bias, start, stop in self._layers(clip):
            rows.setdefault((module, weight, bias), set()).update(range(start, stop))
        for (module, weight, bias), chosen in rows.items():
            scale = Scale(getattr(module, weight).detach(), sorted(chosen))
            parametrize.register_parametrization(module, weight, scale)
            if bias is not None:
                parametrize.register_parametrization(module, bias, Shift(getattr(module, bias).detach(), scale))

    @torch.no_grad()
    def reset(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, Scale | Shift):
                for parameter in module.parameters():
                    parameter.zero_()

    def choose(self, model: nn.Module) -> None:
        train_added(model, (Scale, Shift), self.settings.keep_module_keywords)

    def _layers(self, clip: nn.Module) -> Iterator[tuple[nn.Module, str, str | None, int, int]]:
        """Yield layers: a module, the names of its weight and its bias, and the rows from `start` to `stop`."""
        settings = self.settings
        blocks = chosen_blocks(clip, "ssf", settings.towers, settings.layers)
        roles = [role for role in ROLES if "linear" in settings.where or role in settings.where]
        wholes: list[Any] = []
        if "patch" in settings.where and "image" in blocks and not settings.layers:
            wholes.append(patch_embedding(clip))
        for tower, found in blocks.items():
            yield from (linear for block in found for role in roles for linear in block.linears()[role])
            if "norm" in settings.where:
                inside = [norm for block in found for norm in layer_norms(block.module)]
                wholes += inside if settings.layers else tower_norms(clip, tower)
        for module in wholes:
            bias = None if module.bias is None else "bias"
            yield module, "weight", bias, 0, len(module.weight)
