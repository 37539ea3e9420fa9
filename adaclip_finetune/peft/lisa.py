"""LISA by tensors (after Pan et al. 2024, "LISA: Layerwise Importance Sampling"): every few steps, a new sample of
CLIP's tensors is drawn by importance, and only these change until the next drawing.

All tensors keep `requires_grad`, which must not change under DDP; the gradients of the others are dropped before the
optimizer sees them, so that neither their weights nor their moments change. A drawing depends on the seed, the step
and the importances alone, and is the same in all processes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adaclip_finetune.config.choices.peft import LisaSettings
from adaclip_finetune.data.sampling import generator
from adaclip_finetune.errors import UserError
from adaclip_finetune.peft.base import (
    MethodState,
    PeftMethod,
    Phase,
    SamplingHistory,
    clip_of,
    holds_keyword,
    learning,
    warn_of_idle_keywords,
)
from adaclip_finetune.peft.importance import importance, snapshot
from adaclip_finetune.processes import from_main

_LEAST = 1e-9  # the least probability, with which enough tensors can always be drawn

Shares = NDArray[np.float64]


class Lisa(PeftMethod):
    """Draws among CLIP's learning tensors, except those that `keep_module_keywords` name, which always learn."""

    settings: LisaSettings

    def __init__(self, settings: LisaSettings) -> None:
        super().__init__(settings)
        self._candidates: dict[str, nn.Parameter] = {}
        self._pretrained: dict[str, Tensor] = {}  # with importance update: the candidates before training, on the CPU
        self._steps: list[int] = []  # one entry a drawing, as in the next two
        self._shares: list[Tensor] = []
        self._drawn: list[Tensor] = []
        self._epoch, self._epochs = 0, 1

    def phases(self, num_epochs: int, batch_size: int) -> list[Phase]:
        self._epochs = num_epochs
        return super().phases(num_epochs, batch_size)

    def on_epoch_start(self, epoch: int) -> bool:
        self._epoch = epoch
        return False

    def choose(self, model: nn.Module) -> None:
        clip, keywords = clip_of(model), self.settings.keep_module_keywords
        warn_of_idle_keywords(clip, keywords)
        self._candidates = {name: own for name, own in sorted(learning(clip)) if not holds_keyword(name, keywords)}
        if not self._candidates:
            raise UserError(
                "peft lisa has nothing to draw from: lower freeze_layer_num or shorten keep_module_keywords"
            )
        if self.settings.importance == "update":
            self._pretrained = {name: snapshot(parameter) for name, parameter in self._candidates.items()}

    def after_backward(self, step: int) -> None:
        if not self._steps or step % self.settings.sampling_interval == 0 or step == self.settings.warmup_steps:
            self._draw(step)
        for parameter, stays in zip(self._candidates.values(), self._drawn[-1].tolist(), strict=True):
            if not stays:
                parameter.grad = None

    def ratio(self, step: int) -> float:
        """Return the fraction of the candidates that is trained at a step: 1 in the warm-up, then falling."""
        settings, after = self.settings, step - self.settings.warmup_steps
        if after < 0:
            return 1.0
        return 1 - (1 - settings.active_ratio) * (min(after / settings.warmup_decay, 1) if settings.warmup_decay else 1)

    def changed_parameters(self, model: nn.Module) -> set[str]:
        ever = torch.stack(self._drawn).any(dim=0).tolist() if self._drawn else [False] * len(self._candidates)
        never = {name for name, drawn in zip(self._candidates, ever, strict=True) if not drawn}
        return super().changed_parameters(model) - never

    def sampling_history(self) -> SamplingHistory | None:
        if not self._steps:
            return None
        return SamplingHistory(
            list(self._candidates), list(self._steps), torch.stack(self._shares), torch.stack(self._drawn)
        )

    def state_dict(self) -> MethodState:
        tensors = {f"pretrained/{name}": tensor for name, tensor in self._pretrained.items()}
        if self._steps:
            tensors |= {"shares": torch.stack(self._shares), "drawn": torch.stack(self._drawn)}
        return MethodState(tensors, {"steps": list(self._steps), "epoch": self._epoch})

    def load_state_dict(self, state: MethodState) -> None:
        self._pretrained = {
            name.removeprefix("pretrained/"): tensor
            for name, tensor in state.tensors.items()
            if name.startswith("pretrained/")
        }
        self._steps, self._epoch = list(state.values["steps"]), state.values["epoch"]
        self._shares, self._drawn = (list(state.tensors[name]) if self._steps else [] for name in ("shares", "drawn"))

    def _draw(self, step: int) -> None:
        count = len(self._candidates)
        shares = probabilities(
            from_main(self._importances()), self.settings.transform, self.settings.schedule, self._progress()
        )
        size = max(1, round(self.ratio(step) * count))
        drawn = generator("lisa", self.seed, step).choice(count, size, replace=False, p=shares)
        self._steps.append(step)
        self._shares.append(torch.from_numpy(shares).float())
        self._drawn.append(torch.zeros(count, dtype=torch.bool).index_fill(0, torch.from_numpy(drawn), True))

    def _importances(self) -> list[float]:
        if self.settings.importance == "update":
            return [importance(self._pretrained[name], own, "l2norm") for name, own in self._candidates.items()]
        gradients = [own.grad for own in self._candidates.values()]
        return [0.0 if grad is None else float(grad.float().norm()) / math.sqrt(grad.numel()) for grad in gradients]

    def _progress(self) -> float:
        return self._epoch / (self._epochs - 1) if self._epochs > 1 else 1.0


def probabilities(values: list[float], transform: str, schedule: str, progress: float) -> Shares:
    """Return the probabilities of tensors from their importances.

    `transform` and `schedule` are those of the settings; `progress` rises from 0 in the first epoch to 1 in the last.
    Importances that are all 0, or not finite as after an overflow in fp16, give equal probabilities.
    """
    v = np.array(values, dtype=np.float64)
    if not np.isfinite(v).all() or not v.any():
        return np.full(len(v), 1 / len(v))
    v = v / v.max()
    kind, *numbers = transform.split("_")
    given = [float(number) for number in numbers]
    if kind == "power":
        v = v ** given[0]
    elif kind == "exp":
        v = np.exp(given[0] * (v - 1))  # e^(s·v), up to a factor
    elif kind == "sat":
        v = v.clip(given[0], given[1])
    elif kind == "uniform":
        v = (np.argsort(np.argsort(-v, kind="stable")) < given[0]).astype(np.float64)
    shape, highest = schedule.split("_")
    risen = {"const": 1.0, "linear": progress, "sin": math.sin(math.pi / 2 * progress), "square": progress**2}[shape]
    weight = float(highest) * risen
    mixed: Shares = np.maximum(weight * v / v.sum() + (1 - weight) / len(v), _LEAST)
    mixed /= mixed.sum()
    return mixed
