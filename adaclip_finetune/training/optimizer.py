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

NOTHING_LEARNS = "nothing is left to train: drop freeze_clip, or use a frame selector (use_policy) or frame_agg"

_EPS = 1e-6
_MAX_TENSOR_NORM = 1.0
_MAX_LOGIT_SCALE = math.log(100)


def build_optimizer(objective: Objective, config: Config, total_steps: int) -> tuple[Optimizer, LambdaLR]:
    """Return the optimizer for what learns in `objective` (not wrapped), and its schedule over `total_steps` updates.

    The parameter groups are clip_decay, clip_no_decay, other_decay and other_no_decay; empty ones are left out. The
    learning rate of CLIP is learning_rate x coef_lr, and parameters with `bias` in their name have no weight decay.
    Raise UserError if nothing learns or there are no updates.
    """
    if total_steps < 1:
        raise UserError("nothing to train on: train_annot yields no batches")
    groups = _parameter_groups(objective, config)
    if not groups:
        raise UserError(NOTHING_LEARNS)
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


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return the learning rate of the next update by the name of the parameter group."""
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


def advance(schedule: LambdaLR, updates: int) -> None:
    """Set a new schedule to where it is after `updates` updates."""
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": updates - 1, "_step_count": updates + 2})
    schedule.step()


def optimizer_tensors(optimizer: Optimizer, objective: Objective) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named `<parameter>/<key>`: moments, and for AdamW the step count."""
    return {
        f"{name.removeprefix('retriever.')}/{key}": value
        for name, parameter in objective.named_parameters()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(optimizer: Optimizer, objective: Objective, tensors: Mapping[str, Tensor]) -> None:
    """Load what `optimizer_tensors` returned. Raise KeyError for a parameter that the objective does not have."""
    parameters = {name.removeprefix("retriever."): parameter for name, parameter in objective.named_parameters()}
    for place, tensor in tensors.items():
        name, key = place.rsplit("/", 1)
        # AdamW keeps its step count on the CPU; moments belong to the device of the parameter.
        device = tensor.device if key == "step" else parameters[name].device
        optimizer.state[parameters[name]][key] = tensor.to(device, copy=True)


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
            if parameters := [parameter for parameter in group["params"] if parameter.grad is not None]:
                self._update(parameters, group["lr"], group["betas"], group["weight_decay"])

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
