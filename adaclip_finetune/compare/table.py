"""The rows of a comparison as text for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from adaclip_finetune.compare.rows import Comparison, Row, Table
from adaclip_finetune.evaluation.bootstrap import RESAMPLES, Difference
from adaclip_finetune.evaluation.metrics import DirectionMetrics

_FIGURES = ("R@1", "95 %", "R@5", "R@10", "MedR", "MeanR")
_COSTS = ("learned of CLIP", "learned of all", "GFLOPs", "videos/s")
_NOTHING = "–"

Cells = list[str]


def as_text(table: Table) -> str:
    """For a terminal: figures, then costs, each in lines of one width, then what is to be said of them."""
    labels = ["", "", *map(_label, table.rows)]
    head = [["text → video", *[""] * 5, "video → text", *[""] * 5], [*_FIGURES, *_FIGURES]]
    figures = [*head, *map(_figures, table.rows)]
    costs = [list(_COSTS), *[_costs(row) for row in table.rows if row.cost]]
    cost_labels = ["", *[_label(row) for row in table.rows if row.cost]]
    parts = [[_title(table)], _aligned(labels, figures), [""]]
    if len(costs) > 1:
        parts += [_aligned(cost_labels, costs), [""]]
    return "\n".join(line for part in (*parts, [*_below(table)]) for line in part)


def as_markdown(table: Table) -> str:
    """One table; zero-shot and models, then what reranking makes of them, each with its label."""
    names = [f"{direction} {name}" for direction in ("T2V", "V2T") for name in _FIGURES]
    head = ["", *names, *_COSTS]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in table.rows:
        cells = [row.label, *_figures(row), *_costs(row)]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([f"### {_title(table)}", "", *lines, "", *[f"- {line}" for line in _below(table)], ""])


def _title(table: Table) -> str:
    first = table.rows[0]
    missing = f", {first.missing} of {first.num_listed} MISSING" if first.missing else ""
    return f"{table.name}: {_asked(first)}{missing}"


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


def _below(table: Table) -> Iterator[str]:
    for row in table.rows:
        asked = _asked(row) if _asked(row) != _asked(table.rows[0]) else ""
        missing = f"{row.missing} of {row.num_listed} videos MISSING" if row.missing else ""
        if said := "; ".join(filter(None, (asked, missing, row.note))):
            yield f"{row.label}: {said}"
    yield from map(_sentence, table.comparisons())
    yield from table.remarks
    test = "p: exact permutation of signs, by video, two-sided; " if table.comparisons() else ""
    yield f"95 %: bootstrap over videos, each with all its captions, {RESAMPLES:,} draws; {test}ties count against"
    if any(row.cost for row in table.rows):
        yield "GFLOPs: multiply-adds a video; videos/s: measured here in this one run, reading included"


def _sentence(comparison: Comparison) -> str:
    directions = f"T2V {_difference(comparison.t2v)}, V2T {_difference(comparison.v2t)}"
    return f"R@1 of {comparison.label} minus {comparison.other}: {directions}"


def _difference(found: Difference) -> str:
    low, high = found.interval
    p = "p < 0.0001" if found.p < 1e-4 else f"p {found.p:.2g}"
    return f"{found.points:+.1f} [{low:+.1f}, {high:+.1f}] ({p})"


def _aligned(labels: Sequence[str], rows: Sequence[Cells]) -> list[str]:
    """The first row may span: a cell before empty ones takes their room."""
    width = max(map(len, labels))
    widths = [max(len(row[column]) for row in rows if "" not in row) + 2 for column in range(len(rows[0]))]
    lines = []
    for label, row in zip(labels, rows, strict=True):
        if "" in row:
            half = len(row) // 2
            cells = [row[start].center(sum(widths[start : start + half])) for start in (0, half)]
        else:
            cells = [cell.rjust(room) for cell, room in zip(row, widths, strict=True)]
        lines.append(f"{label:<{width}}{''.join(cells)}".rstrip())
    return lines
