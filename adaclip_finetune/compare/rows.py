"""What a comparison found: rows of figures, data set by data set, and the differences between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from adaclip_finetune.data.queries import Queries
from adaclip_finetune.evaluation.bootstrap import Difference, Interval, intervals, paired_difference
from adaclip_finetune.evaluation.metrics import DirectionMetrics

Kind = Literal["zero-shot", "model", "reranked"]


@dataclass(frozen=True)
class Cost:
    """What a model takes: parameters that learned, in percent of CLIP's and of all (None where that is not known);
    10⁹ multiply-adds a video; videos a second, reading included, as measured in this run."""

    percent_of_clip: float | None
    percent_of_all: float | None
    gflops: float
    videos_per_second: float


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the table. `v2t` is None where a method has no such direction. `baseline` is the label of the
    zero-shot row that belongs to a model."""

    label: str
    kind: Kind
    t2v: DirectionMetrics
    v2t: DirectionMetrics | None
    queries: Queries
    num_listed: int
    cost: Cost | None = None
    baseline: str | None = None
    note: str = ""

    @property
    def missing(self) -> int:
        """Videos of the annotation that were left out, on request (`skip_missing`)."""
        return self.num_listed - len(self.queries.video_ids)

    @cached_property
    def intervals(self) -> dict[str, dict[str, Interval]]:
        """95 % intervals of the figures of `t2v`, and of `v2t` where there is that."""
        found = {"t2v": intervals(self.t2v.ranks, self.queries.video_of_text)}
        return found if self.v2t is None else {**found, "v2t": intervals(self.v2t.ranks)}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        of = {"videos_evaluated": len(self.queries.video_ids), "videos_listed": self.num_listed}
        figures: dict[str, Any] = {"t2v": self.t2v.as_dict() | of, "v2t": self.v2t and self.v2t.as_dict() | of}
        for name, found in self.intervals.items():
            figures[name] |= {f"{figure} 95%": interval for figure, interval in found.items()}
        cost = None if self.cost is None else asdict(self.cost)
        return {"label": self.label, "kind": self.kind, "note": self.note, **figures, "cost": cost}


@dataclass(frozen=True)
class Comparison:
    """R@1 of one row minus that of another, in both directions."""

    label: str
    other: str
    t2v: Difference
    v2t: Difference

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"label": self.label, "minus": self.other, "t2v": self.t2v.as_dict(), "v2t": self.v2t.as_dict()}


@dataclass(frozen=True, eq=False)
class Group:
    """The rows of one data set: the part of the table that is named after it. `remarks` are lines for below it."""

    name: str
    rows: list[Row]
    remarks: list[str] = field(default_factory=list)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Each model against its zero-shot row, then each against every model before it; only where both were asked the
        same."""
        of = {row.label: row for row in self.rows}
        models = [row for row in self.rows if row.kind == "model"]
        pairs = [(row, of[row.baseline]) for row in models if row.baseline in of]
        pairs += [(row, other) for number, row in enumerate(models) for other in models[:number]]
        return [_compared(row, other) for row, other in pairs if same_queries(row.queries, other.queries)]


def as_dict(groups: Sequence[Group]) -> dict[str, Any]:
    """For JSON: one list of rows, one of differences, one of remarks; each entry names its data set."""
    content: dict[str, Any] = {"rows": [], "differences_in_R@1": [], "remarks": []}
    for group in groups:
        of = {"annotation": group.name}
        content["rows"] += [of | row.as_dict() for row in group.rows]
        content["differences_in_R@1"] += [of | comparison.as_dict() for comparison in group.comparisons]
        content["remarks"] += [of | {"remark": remark} for remark in group.remarks]
    return content


def _compared(row: Row, other: Row) -> Comparison:
    assert row.v2t is not None and other.v2t is not None, "models and zero-shot have both directions"
    t2v = paired_difference(row.t2v.ranks, other.t2v.ranks, row.queries.video_of_text)
    return Comparison(row.label, other.label, t2v, paired_difference(row.v2t.ranks, other.v2t.ranks))


def same_queries(one: Queries, other: Queries) -> bool:
    """Whether the same texts are asked of the same videos, in the same order."""
    owners = one.video_of_text.tolist() == other.video_of_text.tolist()
    return owners and one.texts == other.texts and one.video_ids == other.video_ids
