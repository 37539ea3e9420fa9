"""Time alternatives in turns.

Other work on the machine slows all alternatives of a turn down alike, so what is compared are ratios within a turn.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaclip_finetune.errors import UserError


@dataclass(frozen=True)
class Setup:
    """Where and how to measure. With `quick`, sizes are as small as they can be, and the figures mean nothing."""

    device: torch.device
    precision: str = "fp32"  # or bf16
    turns: int = 3
    quick: bool = False
    processor_time: bool = False  # of this process and its children, instead of the time that passes

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def now(self) -> float:
        """Return the time in seconds at which the device has done everything."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        if not self.processor_time:
            return time.perf_counter()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime


@dataclass(frozen=True)
class Aim:
    """`ours` should be `reach` times as fast as `reference`; without `reach` the ratio is only reported."""

    ours: str
    reference: str
    reach: float | None = None


@dataclass(frozen=True)
class Measured:
    """What one case of a row took: the seconds of each alternative in each turn, and other figures by name."""

    case: str
    seconds: Mapping[str, Sequence[float]]
    aims: Sequence[Aim]
    notes: Mapping[str, float] = field(default_factory=dict)

    def ratios(self, aim: Aim) -> list[float]:
        """Return how many times as fast `aim.ours` was in each turn, in ascending order."""
        pairs = zip(self.seconds[aim.ours], self.seconds[aim.reference], strict=True)
        return sorted(reference / ours for ours, reference in pairs)

    def median(self, name: str) -> float:
        """Return the median time of an alternative, in seconds."""
        return statistics.median(self.seconds[name])


def in_turns(setup: Setup, alternatives: Mapping[str, Callable[[], object]], calls: int = 1) -> dict[str, list[float]]:
    """Return the seconds of a call of each alternative, one mean of `calls` calls for each turn.

    The first turn is not timed, and every second one goes through the alternatives backwards.
    """
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(setup.turns + 1):
        for name, call in list(alternatives.items())[:: 1 if turn % 2 else -1]:
            started = setup.now()
            for _ in range(calls):
                call()
            if turn:
                seconds[name].append((setup.now() - started) / calls)
    return seconds


def check(what: str, ours: Tensor, reference: Tensor, within: float, at_least: float = 0.0) -> None:
    """Raise UserError if two tensors differ by more than `within` times the largest entry of the reference.

    `at_least` stands in for a largest entry that is smaller, such as that of a gradient which is zero but for rounding.
    """
    largest = max(float(reference.abs().max()), at_least) or 1.0
    same_shape = ours.shape == reference.shape
    difference = float((ours.to(reference.dtype) - reference).abs().max()) if same_shape else math.nan
    if not difference <= within * largest:
        raise UserError(
            f"bench: {what} differ from the reference by {difference:.2g}, where the largest is {largest:.2g}; "
            "nothing of this row was timed"
        )
