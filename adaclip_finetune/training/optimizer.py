"""Optimizers and learning rate schedules of the published systems.

BertAdam (Devlin et al. 2019) is AdaCLIP's, AdamW that of CLIP4Clip, CenterCLIP and DGL; CLIP-ViP (Xue et al. 2023) has
an AdamW of its own.

The schedule is a `LambdaLR` that is stepped after the optimizer, so the `lr` of a parameter group is always the
learning rate of the next update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError
from adaclip_finetune.objectives.base import Objective

_EPS = 1e-6
_LOWEST_RATE = 1e-8  # of the published schedules that have one
_MAX_TENSOR_NORM = 1.0
_MAX_LOGIT_SCALE = math.log(100)


def build_optimizer(objective: Objective, config: Config, total_steps: int) -> tuple[Optimizer, LambdaLR]:
    """Return the optimizer for what learns in `objective` (not wrapped), and its schedule over `total_steps` updates.

    The parameter groups are clip_decay, clip_no_decay, other_decay and other_no_decay; empty ones are left out. The
    learning rate of CLIP is learning_rate x coef_lr. Parameters with `bias` in their name have no weight decay; with
    CLIP-ViP's AdamW the logit scale has none either. Raise UserError if there are no updates.
    """
    if total_steps < 1:
        raise UserError("nothing to train on: train_annot yields no batches")
    groups = _parameter_groups(objective, config)
    optimizer: Optimizer
    if config.optim == "bertadam":
        optimizer = BertAdam(groups, config.learning_rate, config.betas, config.weight_decay)
    elif config.optim == "adamw":
        # In one pass over the memory. It does not look at strides, and resumed moments are contiguous. On an overflow
        # of fp16 the scaler would call it all the same, and the schedule would count an update that was skipped.
        contiguous = all(parameter.is_contiguous() for group in groups for parameter in group["params"])
        fused = contiguous and config.precision != "fp16"
        optimizer = AdamW(groups, config.learning_rate, config.betas, config.adam_epsilon, fused=fused)
    else:
        optimizer = ClipVipAdamW(groups, config.learning_rate, config.betas, config.adam_epsilon)
    if config.no_warmup:
        return optimizer, LambdaLR(optimizer, lambda step: 1.0)
    follow, lowest = SCHEDULES[config.lr_schedule], _LOWEST_RATE / config.learning_rate
    return optimizer, LambdaLR(optimizer, lambda step: follow(step, total_steps, config.warmup_proportion, lowest))


def bert_schedule(step: int, total: int, warmup: float, lowest: float = 0) -> float:
    """Return the learning rate factor of the update after `step` of `total` updates.

    It rises linearly from 0 over the share `warmup` of the updates and is 0.5·(1 + cos(π·step / total)) from there.
    """
    x = min(step / total, 1.0)
    return x / warmup if x < warmup else _cosine(x)


def clip4clip_schedule(step: int, total: int, warmup: float, lowest: float) -> float:
    """Return the factor that rises from `lowest` to 1 over the warm-up, and falls like a cosine over the rest."""
    steps = warmup * total
    if step <= steps:
        return step / steps * (1 - lowest) + lowest if steps else 1.0
    return max(_cosine(min((step - steps) / (total - steps), 1.0)), lowest)


def clip_vip_schedule(step: int, total: int, warmup: float, lowest: float) -> float:
    """Return the factor that reaches 1 with the last update of the warm-up, and `lowest` with the last one of all."""
    update, steps = step + 1, int(warmup * total)
    return update / steps if update < steps else max(_cosine(min((update - steps) / (total - steps), 1.0)), lowest)


def _cosine(x: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * x))


SCHEDULES: dict[str, Callable[[int, int, float, float], float]] = {
    "bert": bert_schedule,
    "clip4clip": clip4clip_schedule,
    "clip_vip": clip_vip_schedule,
}


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
        norms = torch.stack(torch._foreach_norm(gradients))  # in one tensor, since a GPU waits for many small kernels
        torch._foreach_mul_(gradients, list((_MAX_TENSOR_NORM / (norms + _EPS)).clamp(max=1)))
        _update_uncorrected(self, parameters, lr, betas, _EPS, weight_decay)


class ClipVipAdamW(Optimizer):
    """AdamW as CLIP-ViP has it: ε is added before the bias correction, and the updated weights decay."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one update with the gradients that are there."""
        for group in self.param_groups:
            by_count: dict[float, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["step"] = torch.zeros((), dtype=torch.float64)
                        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                    state["step"] += 1
                    by_count.setdefault(float(state["step"]), []).append(parameter)
            (first, second), rate = group["betas"], group["lr"]
            for count, learning in by_count.items():
                size = rate * math.sqrt(1 - second**count) / (1 - first**count)
                _update_uncorrected(self, learning, size, group["betas"], group["eps"], 0)
                torch._foreach_mul_(learning, 1 - rate * group["weight_decay"])


def _update_uncorrected(
    optimizer: Optimizer,
    parameters: list[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update parameters, all of which have gradients, and their moments as AdamW without bias correction.

    AdamW after infinitely many steps, when its correction is 1, does that in one pass over the memory.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    means = [optimizer.state[parameter]["exp_avg"] for parameter in parameters]
    squares = [optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters]
    endless = [torch.full((), torch.inf, device=parameters[0].device)] * len(parameters)
    rows = zip(parameters, gradients, means, squares, strict=True)
    adamw(
        *(parameters, gradients, means, squares, [], endless),
        fused=all(len({tensor.stride() for tensor in row}) == 1 for row in rows),  # it does not look at strides
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def _parameter_groups(objective: Objective, config: Config) -> list[dict[str, Any]]:
    clip = {id(parameter) for parameter in objective.retriever.clip.parameters()}
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            part = "clip" if id(parameter) in clip else "other"
            undecayed = "bias" in name or (config.optim == "clip_vip_adamw" and "logit_scale" in name)
            groups.setdefault(f"{part}_no_decay" if undecayed else f"{part}_decay", []).append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": config.learning_rate * (config.coef_lr if name.startswith("clip") else 1),
            "weight_decay": 0.0 if name.endswith("no_decay") else config.weight_decay,
        }
        for name, parameters in sorted(groups.items())
    ]
