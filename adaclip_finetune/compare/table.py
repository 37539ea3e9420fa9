"""The table of a comparison: rows of figures for each data set, differences between rows; as text, Markdown and JSON.

Columns are the figures that the task shows. A task that gives ranks gets an interval beside each R@1, and p-values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from adaclip_finetune.data.queries import Queries
from adaclip_finetune.evaluation.bootstrap import RESAMPLES, Difference, Interval, intervals, paired_difference
from adaclip_finetune.evaluation.tasks.base import QueryRanks
from adaclip_finetune.printable import printable

_COSTS = ("trained of CLIP", "trained of all", "GFLOPs", "videos/s")
_INTERVAL = "95 %"
_NOTHING = "–"

RowKind = Literal["zero-shot", "model", "reranked"]


@dataclass(frozen=True)
class Cost:
    """What a model takes: the parameters that learned, in percent of those of CLIP and of all (None if not known);
    10⁹ multiply-adds a video; videos a second, reading included, as measured in this run."""

    percent_of_clip: float | None
    percent_of_all: float | None
    gflops: float
    videos_per_second: float


@dataclass(frozen=True, eq=False)
class TableRow:
    """One line of the table.

    `figures` are those of metrics.json, and `columns` the names of those that are shown; a figure that a method does
    not have is absent. `gallery` describes what was measured on its first line, and has remarks on further ones.
    `baseline` is the label of the zero-shot row that belongs to a model.
    """

    label: str
    kind: RowKind
    figures: Mapping[str, Any]
    columns: Sequence[str]
    ranks: Mapping[str, QueryRanks]
    queries: Queries
    gallery: str
    cost: Cost | None = None
    baseline: str | None = None
    note: str = ""

    @property
    def measured_on(self) -> str:
        """The first line of `gallery`."""
        return self.gallery.splitlines()[0]

    @cached_property
    def intervals(self) -> dict[str, dict[str, Interval]]:
        """The 95 % intervals of R@K, MedR and MeanR in each direction that has ranks."""
        return {direction: intervals(*found) for direction, found in self.ranks.items()}

    def cell(self, name: str) -> str:
        """Return the figure with this name, such as `t2v.R@5`, or the interval `t2v.95 %` of R@1, as it is shown."""
        *path, last = name.split(".")
        if last == _INTERVAL:
            found: Any = self.intervals.get(path[0])
            return _NOTHING if found is None else f"[{found['R@1'][0]:.1f}, {found['R@1'][1]:.1f}]"
        found = self.figures
        for part in (*path, last):
            found = None if found is None else found.get(part)
        return _NOTHING if found is None else f"{found:.1f}"

    def costs(self) -> list[str]:
        """Return the cells for `_COSTS`."""
        if self.cost is None:
            return [_NOTHING] * len(_COSTS)
        learned = (self.cost.percent_of_clip, self.cost.percent_of_all)
        shares = [_NOTHING if share is None else f"{share:.3f} %" for share in learned]
        return [*shares, f"{self.cost.gflops:.3g}", f"{self.cost.videos_per_second:.1f}"]

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON, each interval beside its figure."""
        figures = dict(self.figures)
        for direction, found in self.intervals.items():
            figures[direction] = {**figures[direction], **{f"{name} 95%": ends for name, ends in found.items()}}
        cost = None if self.cost is None else asdict(self.cost)
        return {"label": self.label, "kind": self.kind, "note": self.note, **figures, "cost": cost}


class RowDifference(NamedTuple):
    """R@1 of one row minus that of another one, in each direction."""

    label: str
    minus: str
    directions: Mapping[str, Difference]

    def as_text(self) -> str:
        """Return the difference in one line."""
        parts = []
        for name, found in self.directions.items():
            p = "p < 0.0001" if found.p < 1e-4 else f"p {found.p:.2g}"
            low, high = found.interval
            parts.append(f"{name.upper()} {found.points:+.1f} [{low:+.1f}, {high:+.1f}] ({p})")
        return f"R@1 of {self.label} minus {self.minus}: {', '.join(parts)}"


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

    @property
    def title(self) -> str:
        return f"{self.name}: {self.rows[0].measured_on}"

    @cached_property
    def differences(self) -> list[RowDifference]:
        """Each model against its zero-shot row, then each against every model before it, if they have the same
        queries."""
        of = {row.label: row for row in self.rows}
        models = [row for row in self.models if row.kind == "model"]
        pairs = [(row, of[row.baseline]) for row in models if row.baseline in of]
        pairs += [(row, other) for number, row in enumerate(models) for other in models[:number]]
        found = []
        for row, other in pairs:
            if row.ranks and same_queries(row.queries, other.queries):
                directions = {
                    name: paired_difference(own.ranks, other.ranks[name].ranks, own.videos)
                    for name, own in row.ranks.items()
                }
                found.append(RowDifference(row.label, other.label, directions))
        return found

    def said(self) -> Iterator[str]:
        """Yield the lines that stand below the table."""
        for row in self.rows:
            gallery = row.measured_on if row.measured_on != self.rows[0].measured_on else ""
            if notes := "; ".join(filter(None, (gallery, *row.gallery.splitlines()[1:], row.note))):
                yield f"{row.label}: {notes}"
        yield from (difference.as_text() for difference in self.differences)
        yield from self.remarks


def same_queries(one: Queries, other: Queries) -> bool:
    """Return whether both ask the same texts about the same videos, in the same order."""
    owners = one.video_of_text.tolist() == other.video_of_text.tolist()
    return owners and one.texts == other.texts and one.video_ids == other.video_ids


def as_text(data_sets: Sequence[DataSetRows]) -> str:
    """Return the table for a terminal: figures, then costs, then remarks; all data sets share their columns."""
    columns = _columns(data_sets)
    figures = {
        data_set.title: [(_label(row), list(map(row.cell, columns))) for row in data_set.rows] for data_set in data_sets
    }
    costs = {data_set.name: [(row.label, row.costs()) for row in data_set.rows if row.cost] for data_set in data_sets}
    lines = _aligned(_head(columns), figures)
    if any(costs.values()):
        lines += ["", *_aligned(_COSTS, costs)]
    for data_set in data_sets:
        lines += ["", *([data_set.name] if len(data_sets) > 1 else []), *data_set.said()]
    return "\n".join(map(printable, [*lines, "", *_explained(data_sets)]))


def as_markdown(data_sets: Sequence[DataSetRows]) -> str:
    """Return one Markdown table, with the data set in the first column, and the remarks as a list."""
    columns = _columns(data_sets)
    table = [["data set", "", *_head(columns), *_COSTS], ["---", "---", *["---:"] * (len(columns) + len(_COSTS))]]
    for data_set in data_sets:
        for row in data_set.rows:
            table.append([data_set.name, row.label, *map(row.cell, columns), *row.costs()])
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in table]
    for data_set in data_sets:
        lines += ["", data_set.title, "", *(f"- {line}" for line in data_set.said())]
    return "\n".join(map(printable, [*lines, "", *_explained(data_sets)])) + "\n"


def as_dict(data_sets: Sequence[DataSetRows]) -> dict[str, Any]:
    """Return lists of rows, differences and remarks for JSON; each entry names its data set."""
    content: dict[str, Any] = {"rows": [], "differences_in_R@1": [], "remarks": []}
    for data_set in data_sets:
        of = {"annotation": data_set.name}
        content["rows"] += [of | row.as_dict() for row in data_set.rows]
        for label, other, directions in data_set.differences:
            found = {name: asdict(difference) for name, difference in directions.items()}
            content["differences_in_R@1"].append({**of, "label": label, "minus": other, **found})
        content["remarks"] += [of | {"remark": remark} for remark in data_set.remarks]
    return content


def _columns(data_sets: Sequence[DataSetRows]) -> list[str]:
    """Return the names of the columns: the task's own, and the interval of each R@1 that has ranks."""
    row, names = data_sets[0].rows[0], []
    for name in row.columns:
        names.append(name)
        direction, _, figure = name.rpartition(".")
        if figure == "R@1" and direction in row.ranks:
            names.append(f"{direction}.{_INTERVAL}")
    return names


def _head(columns: Sequence[str]) -> list[str]:
    """Return the column titles: the direction stands before the first figure of each direction only."""
    titles, last = [], ""
    for name in columns:
        direction, _, figure = name.rpartition(".")
        titles.append(figure if direction == last else f"{direction.upper()} {figure}")
        last = direction
    return titles


def _aligned(head: Sequence[str], table: Mapping[str, Sequence[tuple[str, Sequence[str]]]]) -> list[str]:
    """Return a head and the rows (label, cells) under each title, in columns as wide as they must be."""
    lines = [("", head), *(line for rows in table.values() for line in rows)]
    width = max(len(label) for label, _ in lines)
    widths = [max(map(len, column)) + 2 for column in zip(*(cells for _, cells in lines), strict=True)]

    def aligned(label: str, cells: Sequence[str]) -> str:
        return f"{label:<{width}}" + "".join(cell.rjust(room) for cell, room in zip(cells, widths, strict=True))

    text = [aligned("", head)]
    for number, (title, rows) in enumerate(table.items()):
        text += [*([""] if number else []), title, *(aligned(*row) for row in rows)]
    return text


def _label(row: TableRow) -> str:
    """Return the label; that of a reranked row, which stands below its model, without the name of the model."""
    return f"  + {row.label.rpartition(' + ')[2]}" if row.kind == "reranked" else row.label


def _explained(data_sets: Sequence[DataSetRows]) -> Iterator[str]:
    """Yield what the figures of all data sets mean."""
    rows = [row for data_set in data_sets for row in data_set.rows]
    compared = sum(len(data_set.differences) for data_set in data_sets)
    if any(row.ranks for row in rows):
        text = f"95 %: bootstrap over videos, each with all its captions, {RESAMPLES:,} draws; exact for R@1 0 and 100"
        text += "; p: exact permutation of signs by video, two-sided" if compared else ""
        yield text + (", not corrected for the number of comparisons" if compared > 1 else "")
    if any(row.cost for row in rows):
        yield "GFLOPs: multiply-adds a video; videos/s: measured in this one run, reading included"
