"""The one table of a comparison as text for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from adaclip_finetune.compare.rows import Comparison, Group, Row
from adaclip_finetune.evaluation.bootstrap import RESAMPLES, Difference
from adaclip_finetune.evaluation.metrics import DirectionMetrics
from adaclip_finetune.printable import printable

_FIGURES = ("R@1", "95 %", "R@5", "R@10", "MedR", "MeanR")
_COSTS = ("learned of CLIP", "learned of all", "GFLOPs", "videos/s")
_NOTHING = "–"

Cells = list[str]
Line = tuple[str, Cells]
"""A label, and the cells behind it."""


def as_text(groups: Sequence[Group]) -> str:
    """For a terminal: figures, then costs, in columns that all data sets share; then what is to be said of them."""
    head: list[Line] = [("", ["text → video", *[""] * 5, "video → text", *[""] * 5]), ("", [*_FIGURES, *_FIGURES])]
    lines = [_title(groups[0])] if len(groups) == 1 else []
    lines += [*_aligned([*head, *_lines([(_title(group), group.rows) for group in groups], _figures)]), ""]
    with_cost = [(group.name, [row for row in group.rows if row.cost]) for group in groups]
    if any(rows for _, rows in with_cost):
        lines += [*_aligned([("", list(_COSTS)), *_lines(with_cost, _costs)]), ""]
    for group in groups:
        said = list(_said(group))
        lines += said if len(groups) == 1 else [group.name, *(f"  {line}" for line in said)]
    return "\n".join(map(printable, [*lines, *_explained(groups)]))


def as_markdown(groups: Sequence[Group]) -> str:
    """One table; of each data set zero-shot and models, and what reranking makes of them, each with its label."""
    several = len(groups) > 1
    names = [f"{direction} {name}" for direction in ("T2V", "V2T") for name in _FIGURES]
    head = [*(["data set"] if several else []), "", *names, *_COSTS]
    lines = [_cells(head), "|---" * (len(head) - len(names) - len(_COSTS)) + "|---:" * len([*names, *_COSTS]) + "|"]
    for group in groups:
        for row in group.rows:
            lines.append(_cells([*([group.name] if several else []), row.label, *_figures(row), *_costs(row)]))
    title = f"{len(groups)} data sets" if several else _title(groups[0])
    below = []
    for group in groups:
        said = [f"- {line}" for line in _said(group)]
        below += [f"- {_title(group)}", *(f"  {line}" for line in said)] if several else said
    below += [f"- {line}" for line in _explained(groups)]
    return "\n".join(map(printable, [f"### {title}", "", *lines, "", *below])) + "\n"


def _cells(cells: Cells) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _lines(groups: Sequence[tuple[str, Sequence[Row]]], cells: Callable[[Row], Cells]) -> Iterator[Line]:
    """Of each data set its heading, where they are several, and its rows."""
    for number, (heading, rows) in enumerate(groups):
        if number:
            yield "", []
        if len(groups) > 1:
            yield heading, []
        yield from ((_label(row), cells(row)) for row in rows)


def _title(group: Group) -> str:
    first = group.rows[0]
    missing = f", {first.missing} of {first.num_listed} MISSING" if first.missing else ""
    return f"{group.name}: {_asked(first)}{missing}"


def _asked(row: Row) -> str:
    return f"{len(row.queries.texts):,} captions, {len(row.queries.video_ids):,} videos"


def _label(row: Row) -> str:
    """What was done to a model's scores stands below the model, whose name need not be said again."""
    return f"  + {row.label.rpartition(' + ')[2]}" if row.kind == "reranked" else row.label


def _figures(row: Row) -> Cells:
    return [*_direction(row, "t2v", row.t2v), *_direction(row, "v2t", row.v2t)]


def _direction(row: Row, name: str, found: DirectionMetrics | None) -> Cells:
    if found is None:
        return [_NOTHING] * len(_FIGURES)
    low, high = row.intervals[name]["R@1"]
    recalls = [f"{found.recall(k):.1f}" for k in (1, 5, 10)]
    return [recalls[0], f"[{low:.1f}, {high:.1f}]", *recalls[1:], f"{found.median_rank:.1f}", f"{found.mean_rank:.1f}"]


def _costs(row: Row) -> Cells:
    if row.cost is None:
        return [_NOTHING] * len(_COSTS)
    shares = [
        _NOTHING if share is None else f"{share:.3f} %" for share in (row.cost.percent_of_clip, row.cost.percent_of_all)
    ]
    return [*shares, f"{row.cost.gflops:.3g}", f"{row.cost.videos_per_second:.1f}"]


def _said(group: Group) -> Iterator[str]:
    """What is to be said of a data set's rows."""
    for row in group.rows:
        asked = _asked(row) if _asked(row) != _asked(group.rows[0]) else ""
        missing = f"{row.missing} of {row.num_listed} videos MISSING" if row.missing else ""
        if said := "; ".join(filter(None, (asked, missing, row.note))):
            yield f"{row.label}: {said}"
    yield from map(_sentence, group.comparisons)
    yield from group.remarks


def _explained(groups: Sequence[Group]) -> Iterator[str]:
    """What is to be said of the figures of all."""
    compared = sum(len(group.comparisons) for group in groups)
    test = "p: exact permutation of signs, by video, two-sided" if compared else ""
    alone = ", each by itself, not corrected for how many they are" if compared > 1 else ""
    drawn = f"95 %: bootstrap over videos, each with all its captions, {RESAMPLES:,} draws; exact for R@1 0 and 100"
    yield "; ".join(filter(None, (drawn, f"{test}{alone}", "ties count against")))
    if any(row.cost for group in groups for row in group.rows):
        yield "GFLOPs: multiply-adds a video; videos/s: measured here in this one run, reading included"


def _sentence(comparison: Comparison) -> str:
    directions = f"T2V {_difference(comparison.t2v)}, V2T {_difference(comparison.v2t)}"
    return f"R@1 of {comparison.label} minus {comparison.other}: {directions}"


def _difference(found: Difference) -> str:
    low, high = found.interval
    p = "p < 0.0001" if found.p < 1e-4 else f"p {found.p:.2g}"
    return f"{found.points:+.1f} [{low:+.1f}, {high:+.1f}] ({p})"


def _aligned(lines: Sequence[Line]) -> list[str]:
    """In columns as wide as they must be. A cell before empty ones takes their room; a line without cells is a heading,
    and takes none."""
    width = max(len(label) for label, cells in lines if cells)
    full = [cells for _, cells in lines if cells and "" not in cells]
    widths = [max(map(len, column)) + 2 for column in zip(*full, strict=True)]
    return [f"{label:<{width}}{''.join(_spaced(cells, widths) if cells else [])}".rstrip() for label, cells in lines]


def _spaced(cells: Cells, widths: Sequence[int]) -> Cells:
    if "" not in cells:
        return [cell.rjust(room) for cell, room in zip(cells, widths, strict=True)]
    half = len(cells) // 2
    return [cells[start].center(sum(widths[start : start + half])) for start in (0, half)]
