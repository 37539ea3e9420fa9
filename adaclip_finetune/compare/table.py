"""The table of a comparison: rows of figures for each data set, differences between rows; as text, Markdown and JSON.

Columns are the figures that the task shows. A task that gives ranks gets an interval beside each R@1, or beside the
figure in its place, and p-values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from adaclip_finetune.data.queries import Queries
from adaclip_finetune.evaluation.bootstrap import RESAMPLES, Difference, Interval, intervals, paired_difference
from adaclip_finetune.evaluation.metrics import DirectionMetrics
from adaclip_finetune.evaluation.tasks.base import QueryRanks, value
from adaclip_finetune.printable import printable

# Name in JSON → title and form of a cost: the parameters that learned, multiply-adds a video in 10⁹, measured speed.
COSTS = {
    "percent_of_clip": ("trained of CLIP", "{:.3f} %"),
    "percent_of_all": ("trained of all", "{:.3f} %"),
    "gflops": ("GFLOPs", "{:.3g}"),
    "videos_per_second": ("videos/s", "{:.1f}"),
}
_INTERVAL = "95 %"
_NOTHING = "–"

RowKind = Literal["zero-shot", "model", "reranked", "interpolated", "baseline", "adapted"]


@dataclass(frozen=True, eq=False)
class TableRow:
    """One line of the table.

    `figures` are those of metrics.json, and `columns` the names of those that are shown; a figure that a method does
    not have is absent. `gallery` describes what was measured on its first line, and has remarks on further ones.
    `cost` has the names of `COSTS`, each None if it is not known; reranked rows have none. `baseline` is the label of
    the zero-shot row that belongs to a model, and `model` that of the model which an adapted row, or a baseline of it,
    starts from.
    """

    label: str
    kind: RowKind
    figures: Mapping[str, Any]
    columns: Sequence[str]
    ranks: Mapping[str, QueryRanks]
    queries: Queries
    gallery: str
    cost: Mapping[str, float | None] = field(default_factory=dict)
    baseline: str | None = None
    note: str = ""
    model: str | None = None

    @cached_property
    def intervals(self) -> dict[str, dict[str, Interval]]:
        """The 95 % intervals of R@K, MedR and MeanR in each direction that has ranks."""
        return {direction: intervals(found.ranks, found.videos) for direction, found in self.ranks.items()}

    def by_tag(self) -> dict[str, TableRow]:
        """Return a row for each tag: the same model, with the text-to-video figures of the queries that have it."""
        if (found := self.ranks.get("t2v")) is None:
            return {}
        rows, whole = {}, replace(self.queries, tags=[])
        for tag, mask in self.queries.by_tag().items():
            own = found.of(mask)
            label, figures = f"  {tag}, {len(own.ranks):,} captions", {"t2v": DirectionMetrics(own.ranks).as_dict()}
            rows[tag] = replace(self, label=label, figures=figures, ranks={"t2v": own}, queries=whole, cost={})
        return rows

    def cell(self, name: str) -> str:
        """Return the figure with this name, such as `t2v.R@5`, or the interval `t2v.95 %` of R@1, as it is shown."""
        direction, _, last = name.rpartition(".")
        if last == _INTERVAL:
            low, high = self.intervals.get(direction, {}).get("R@1", (None, None))
            return _NOTHING if low is None else f"[{low:.1f}, {high:.1f}]"
        try:
            return f"{value(self.figures, name):.1f}"
        except (KeyError, TypeError):  # a method does not have this figure, or this direction
            return _NOTHING

    def costs(self) -> list[str]:
        """Return the cells for `COSTS`."""
        found = [(form, self.cost.get(name)) for name, (_, form) in COSTS.items()]
        return [_NOTHING if cost is None else form.format(cost) for form, cost in found]

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON, each interval beside its figure."""
        figures = dict(self.figures)
        for direction, found in self.intervals.items():
            if names := self.ranks[direction].names:
                figures |= {f"{names[name]} 95%": ends for name, ends in found.items() if name in names}
            else:
                figures[direction] = {**figures[direction], **{f"{name} 95%": ends for name, ends in found.items()}}
        if rows := self.by_tag():
            figures["tags"] = {tag: row.as_dict()["t2v"] for tag, row in rows.items()}
        return {"label": self.label, "kind": self.kind, "note": self.note, **figures, "cost": self.cost or None}


@dataclass(eq=False)
class DataSetRows:
    """The rows of one data set. `baselines` are the zero-shot rows, by what identifies the CLIP; `remarks` are lines
    below the table."""

    name: str
    baselines: dict[tuple[Any, ...], TableRow] = field(default_factory=dict)
    models: list[TableRow] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[TableRow]:
        """All rows, zero-shot first."""
        return [*self.baselines.values(), *self.models]

    @cached_property
    def differences(self) -> list[tuple[str, str, dict[str, Difference]]]:
        """R@1 of each model minus its zero-shot row, then minus every model before it, on the same queries.

        Each is the labels of the two rows, and the difference by direction, then text to video by tag. Nothing is
        compared with interpolated rows, but they are with the finetuned model before them. The baselines of an
        adapted model are compared with the model as it is, and the adapted model with all of these.
        """
        of = {row.label: row for row in self.rows}
        models = [row for row in self.models if row.kind != "reranked" and row.ranks]
        pairs = [(row, of[row.baseline]) for row in models if row.baseline in of]
        pairs += [
            (row, other) for number, row in enumerate(models) for other in models[:number] if _are_compared(row, other)
        ]
        found = []
        for row, other in pairs:
            if (row.queries.texts, row.queries.video_ids) == (other.queries.texts, other.queries.video_ids):
                pairs_of_ranks = {name: (own, other.ranks[name]) for name, own in row.ranks.items()}
                for tag, mask in row.queries.by_tag().items() if "t2v" in row.ranks else ():
                    pairs_of_ranks[f"t2v of {tag}"] = row.ranks["t2v"].of(mask), other.ranks["t2v"].of(mask)
                directions = {
                    name: paired_difference(own.ranks, before.ranks, own.videos)
                    for name, (own, before) in pairs_of_ranks.items()
                }
                found.append((row.label, other.label, directions))
        return found

    def said(self) -> Iterator[str]:
        """Yield the lines that stand below the table."""
        common = self.rows[0].gallery.splitlines()[0]
        yield f"{self.name}: {common}"
        for row in self.rows:
            measured_on, *remarks = row.gallery.splitlines()
            different = measured_on if measured_on != common else ""
            if notes := "; ".join(filter(None, (different, *remarks, row.note))):
                yield f"{row.label}: {notes}"
        for label, other, directions in self.differences:
            parts, of = [], "R@1"
            for name, found in directions.items():
                p = "p < 0.0001" if found.p < 1e-4 else f"p {found.p:.2g}"
                low, high = found.interval
                if name in self.rows[0].columns:  # a figure with a name of its own
                    of, title = name, ""
                else:
                    title = f"{name[:3].upper()}{name[3:]} "
                parts.append(f"{title}{found.points:+.1f} [{low:+.1f}, {high:+.1f}] ({p})")
            yield f"{of} of {label} minus {other}: {', '.join(parts)}"
        yield from self.remarks


def _are_compared(row: TableRow, other: TableRow) -> bool:
    """Return whether the R@1 of a row is compared with that of a row above it."""
    if other.kind == "model":
        return row.model in (None, other.label)
    return row.kind == "adapted" and row.model == other.model


def as_text(data_sets: Sequence[DataSetRows]) -> str:
    """Return the table for a terminal: figures, then costs, then remarks."""
    cells = _cells(data_sets)
    first, last = 0 if len(data_sets) > 1 else 1, -len(COSTS)
    costs = [[*row[first:2], *row[last:]] for row in cells if row[-1] != _NOTHING]
    lines = [*_aligned([row[first:last] for row in cells]), *(["", *_aligned(costs)] if len(costs) > 1 else [])]
    return "\n".join(map(printable, [*lines, *_below(data_sets)]))


def as_markdown(data_sets: Sequence[DataSetRows]) -> str:
    """Return the table with all its columns, and the remarks as a list."""
    head, *rows = _cells(data_sets)
    table = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in table]
    remarks = [f"- {line}" if line else "" for line in _below(data_sets)]
    return "\n".join(map(printable, [*lines, *remarks])) + "\n"


def as_dict(data_sets: Sequence[DataSetRows]) -> dict[str, Any]:
    """Return lists of rows, differences and remarks for JSON; each entry names its data set."""
    content: dict[str, Any] = {"rows": [], "differences_in_R@1": [], "remarks": []}
    for data_set in data_sets:
        of = {"annotation": data_set.name}
        content["rows"] += [of | row.as_dict() for row in data_set.rows]
        for label, other, directions in data_set.differences:
            found = {name: vars(difference) for name, difference in directions.items()}
            content["differences_in_R@1"].append({**of, "label": label, "minus": other, **found})
        content["remarks"] += [of | {"remark": remark} for remark in data_set.remarks]
    return content


def _cells(data_sets: Sequence[DataSetRows]) -> list[list[str]]:
    """Return the head and the rows: data set, label, the task's figures with an interval after each R@1, and costs."""
    first, before = data_sets[0].rows[0], ""
    columns: dict[str, str] = {}  # name → title, in which the direction stands before its first figure only
    for name in first.columns:
        direction, _, figure = name.rpartition(".")
        columns[name] = figure if direction == before else f"{direction.upper()} {figure}"
        if name in first.ranks:  # a figure with a name of its own
            columns[f"{name}.{_INTERVAL}"] = _INTERVAL
        elif figure == "R@1" and direction in first.ranks:
            columns[f"{direction}.{_INTERVAL}"] = _INTERVAL
        before = direction
    rows = [
        (data_set.name, one) for data_set in data_sets for row in data_set.rows for one in (row, *row.by_tag().values())
    ]
    head = ["data set", "", *columns.values(), *(title for title, _ in COSTS.values())]
    return [head, *([name, row.label, *map(row.cell, columns), *row.costs()] for name, row in rows)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines, in columns as wide as they must be: text at the left, figures at the right."""
    columns = []
    for place, column in enumerate(zip(*rows, strict=True)):
        width, is_text = max(map(len, column)), place <= rows[0].index("")
        columns.append([cell.ljust(width) if is_text else cell.rjust(width) for cell in column])
    return ["  ".join(cells) for cells in zip(*columns, strict=True)]


def _below(data_sets: Sequence[DataSetRows]) -> Iterator[str]:
    """Yield the remarks on each data set, and what the figures of all of them mean."""
    for data_set in data_sets:
        yield from ("", *data_set.said())
    yield ""
    rows = [row for data_set in data_sets for row in data_set.rows]
    compared = sum(len(data_set.differences) for data_set in data_sets)
    if any(row.ranks for row in rows):
        captions = ", each with all its captions" if any("t2v" in row.ranks for row in rows) else ""
        text = f"95 %: bootstrap over videos{captions}, {RESAMPLES:,} draws; exact for 0 and 100"
        text += "; p: exact permutation of signs by video, two-sided" if compared else ""
        yield text + (", not corrected for the number of comparisons" if compared > 1 else "")
    if any(row.cost for row in rows):
        yield "GFLOPs: multiply-adds a video; videos/s: measured in this one run, reading included"
