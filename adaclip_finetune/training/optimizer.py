"""BertAdam (the optimizer of Devlin et al. 2019), AdamW, and the learning rate schedule of both.

The schedule is a `LambdaLR` that is stepped after the optimizer, so the `lr` of a parameter group is always the
learning rate of the next update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError
from adaclip_finetune.objectives.base import Objective

_EPS = 1e-6
_MAX_TENSOR_NORM = 1.0
_MAX_LOGIT_SCALE = math.log(100)


def build_optimizer(objective: Objective, config: Config, total_steps: int) -> tuple[Optimizer, LambdaLR]:
    """Return the optimizer for what learns in `objective` (not wrapped), and its schedule over `total_steps` updates.

    The parameter groups are clip_decay, clip_no_decay, other_decay and other_no_decay; empty ones are left out. The
    learning rate of CLIP is learning_rate x coef_lr, and parameters with `bias` in their name have no weight decay.
    Raise UserError if there are no updates.
    """
    if total_steps < 1:
        raise UserError("nothing to train on: train_annot yields no batches")
    groups = _parameter_groups(objective, config)
    optimizer: Optimizer
    if config.optim == "adamw":
        optimizer = AdamW(groups, config.learning_rate, config.betas)
    else:
        optimizer = BertAdam(groups, config.learning_rate, config.betas, config.weight_decay)
    warmup, constant = config.warmup_proportion, config.no_warmup
    return optimizer, LambdaLR(optimizer, lambda step: schedule(step / total_steps, warmup, constant))


def schedule(x: float, warmup_proportion: float, no_warmup: bool) -> float:
    """Return the learning rate factor after a share x (0 to 1) of all updates.

    It rises linearly from 0 over `warmup_proportion` and is 0.5·(1 + cos(π·x)) from there; with `no_warmup` it is 1.
    """
    if no_warmup:
        return 1.0
    if x < warmup_proportion:
        return x / warmup_proportion
    return 0.5 * (1 + math.cos(math.pi * min(x, 1.0)))


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the optimizer's tensors, named `<number of the parameter>/<key>`, and its parameter groups."""
    state = optimizer.state_dict()
    tensors = {f"{number}/{key}": tensor for number, kept in state["state"].items() for key, tensor in kept.items()}
    return tensors, state["param_groups"]


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> None:
    """Load what `optimizer_state` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for place, tensor in tensors.items():
        number, key = place.split("/")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@torch.no_grad()
def clamp_logit_scale(clip: nn.Module) -> None:
    """Limit CLIP's `logit_scale`, if it learns, to ln 100, as in the training of CLIP. Call it after each update."""
    scale = clip.get_parameter("logit_scale")
    # The value in OpenAI's weights is a rounding error above ln 100 and must not change while it is frozen.
    if scale.requires_grad:
        scale.clamp_(max=_MAX_LOGIT_SCALE)


class BertAdam(Optimizer):
    """Adam as used for BERT: moments without bias correction, and decay x weight added to the update.

    The gradient of each tensor is first clipped, in place, to norm 1. Parameters without a gradient do not change.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one update with the gradients that are there."""
        for group in self.param_groups:
            if learning := [parameter for parameter in group["params"] if parameter.grad is not None]:
                self._update(learning, group["lr"], group["betas"], group["weight_decay"])

    def _update(self, parameters: list[Tensor], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        for new in [parameter for parameter in parameters if not self.state[parameter]]:
            self.state[new] = {name: torch.zeros_like(new) for name in ("exp_avg", "exp_avg_sq")}
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        means = [self.state[parameter]["exp_avg"] for parameter in parameters]
        squares = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]

        norms = torch._foreach_norm(gradients)
        torch._foreach_mul_(gradients, [(_MAX_TENSOR_NORM / (norm + _EPS)).clamp(max=1) for norm in norms])
        torch._foreach_mul_(means, betas[0])
        torch._foreach_add_(means, gradients, alpha=1 - betas[0])
        torch._foreach_mul_(squares, betas[1])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - betas[1])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, _EPS)
        # w - lr·(m/(√v + ε) + decay·w), without a third copy of the weights.
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_addcdiv_(parameters, means, roots, -lr)


def _parameter_groups(objective: Objective, config: Config) -> list[dict[str, Any]]:
    clip = {id(parameter) for parameter in objective.retriever.clip.parameters()}
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            part = "clip" if id(parameter) in clip else "other"
            groups.setdefault(f"{part}_no_decay" if "bias" in name else f"{part}_decay", []).append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": config.learning_rate * (config.coef_lr if name.startswith("clip") else 1),
            "weight_decay": 0.0 if name.endswith("no_decay") else config.weight_decay,
        }
        for name, parameters in sorted(groups.items())
    ]
