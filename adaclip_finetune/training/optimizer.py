"""BertAdam (the optimizer of Devlin et al. 2019), AdamW, and the one schedule of both.

One mechanism sets the learning rate: a `LambdaLR`, stepped after the optimizer. A group's `lr` is therefore at any time
the rate of the coming update, readable for the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError
from adaclip_finetune.objectives.base import Objective

NOTHING_LEARNS = "nothing is left to learn: drop freeze_clip, or use a frame selector (use_policy) or frame_agg"

_EPS = 1e-6
_MAX_TENSOR_NORM = 1.0
_MAX_LOGIT_SCALE = math.log(100)


def build_optimizer(objective: Objective, config: Config, total_steps: int) -> tuple[Optimizer, LambdaLR]:
    """The optimizer of what learns in `objective` (not wrapped), and its schedule over all updates.

    Groups are named clip_decay, clip_no_decay, other_decay and other_no_decay; empty ones are left out. CLIP's learning
    rate is learning_rate x coef_lr; what has `bias` in its name does not decay. Step the schedule after each update.

    Raises UserError where nothing learns, or for no updates at all.
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

    def factor(step: int) -> float:
        return schedule(step / total_steps, config.warmup_proportion, config.no_warmup)

    return optimizer, LambdaLR(optimizer, factor)


def schedule(x: float, warmup_proportion: float, no_warmup: bool) -> float:
    """The share of the full learning rate when x, from 0 to 1, of all updates are done.

    Linear from 0 over `warmup_proportion`, then 0.5·(1 + cos(π·x)); 1 throughout with `no_warmup`.
    """
    if no_warmup:
        return 1.0
    if x < warmup_proportion:
        return x / warmup_proportion
    return 0.5 * (1 + math.cos(math.pi * min(x, 1.0)))


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Learning rate of the coming update by group name."""
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


def advance(schedule: LambdaLR, updates: int) -> None:
    """Put a new schedule where one is that has seen so many updates."""
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": updates, "_step_count": updates + 1})
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(updates)


def optimizer_tensors(optimizer: Optimizer, objective: Objective) -> dict[str, Tensor]:
    """What the optimizer remembers, as "<parameter>/<key>": its moments, and AdamW's count of steps."""
    return {
        f"{name.removeprefix('retriever.')}/{key}": value
        for name, parameter in objective.named_parameters()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(optimizer: Optimizer, objective: Objective, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave. Raises KeyError for a parameter that the objective does not have."""
    parameters = {name.removeprefix("retriever."): parameter for name, parameter in objective.named_parameters()}
    for place, tensor in tensors.items():
        name, key = place.rsplit("/", 1)
        # AdamW keeps its count on the CPU; what has the shape of the parameter belongs where that is.
        device = parameters[name].device if key != "step" else tensor.device
        optimizer.state[parameters[name]][key] = tensor.to(device, copy=True)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], grad_norm: float) -> Tensor | None:
    """Scale all gradients together down to norm `grad_norm`; -1: leave them. Returns their norm before."""
    if grad_norm == -1:
        return None
    return torch.nn.utils.clip_grad_norm_(parameters, grad_norm)


@torch.no_grad()
def clamp_logit_scale(clip: nn.Module) -> None:
    """Hold CLIP's `logit_scale`, if it learns, at ≤ ln 100, as CLIP itself was trained. Call it after each update."""
    scale = clip.get_parameter("logit_scale")
    # OpenAI's own value is a rounding error above ln 100: frozen, it must stay bit for bit.
    if scale.requires_grad:
        scale.clamp_(max=_MAX_LOGIT_SCALE)


class BertAdam(Optimizer):
    """Adam as BERT was trained: moments without bias correction; decay x weight added to the update, not the gradient.

    Each tensor's gradient is first clipped, in place, to norm 1 of its own. Parameters without a gradient stay.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group["lr"], group["betas"], group["weight_decay"])
        return loss

    def _update(self, parameters: list[Tensor], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        means = [self._moment(parameter, "exp_avg") for parameter in parameters]
        squares = [self._moment(parameter, "exp_avg_sq") for parameter in parameters]

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

    def _moment(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        moment: Tensor = state[name]
        return moment


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
