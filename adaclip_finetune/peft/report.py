"""Counts of the parameters that learn in CLIP, in the frame selector and in the aggregator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from torch import nn

from adaclip_finetune.peft.base import clip_of


@dataclass(frozen=True)
class Count:
    """Numbers of single parameters, not of tensors."""

    trainable: int
    total: int

    def __add__(self, other: Count) -> Count:
        return Count(self.trainable + other.trainable, self.total + other.total)

    @property
    def percent(self) -> float:
        """The percentage that learns; 0 if there are no parameters."""
        return 100 * self.trainable / self.total if self.total else 0.0


@dataclass(frozen=True)
class TrainableReport:
    """`aggregator` is all outside CLIP and the selector. A frozen copy of CLIP counts in the selector's total."""

    clip: Count
    selector: Count
    aggregator: Count

    @property
    def all(self) -> Count:
        """The whole model."""
        return self.clip + self.selector + self.aggregator

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Return `{"clip": {"trainable": …, "total": …}, "selector": …, "aggregator": …}`, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Mapping[str, int]]) -> TrainableReport:
        """Return the report from the result of `as_dict`."""
        return cls(**{name: Count(**part) for name, part in content.items()})

    def __str__(self) -> str:
        rows = [("CLIP", self.clip), ("selector", self.selector), ("aggregator", self.aggregator), ("all", self.all)]
        lines = [
            f"{name:<10} {count.trainable:>13,} of {count.total:>13,} trained ({count.percent:.3f} %)"
            for name, count in rows
        ]
        return "\n".join(lines)


def trainable_report(model: nn.Module) -> TrainableReport:
    """Count the model's parameters, each once, even if two modules share it."""
    clip = list(clip_of(model).parameters())
    selector = getattr(model, "selector", None)
    chosen = _without(selector.parameters(), clip) if isinstance(selector, nn.Module) else []
    return TrainableReport(_count(clip), _count(chosen), _count(_without(model.parameters(), clip + chosen)))


def _without(parameters: Iterable[nn.Parameter], others: list[nn.Parameter]) -> list[nn.Parameter]:
    seen = {id(parameter) for parameter in others}
    return [parameter for parameter in parameters if id(parameter) not in seen]


def _count(parameters: Iterable[nn.Parameter]) -> Count:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    return Count(sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes))
