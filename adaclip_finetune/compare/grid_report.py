"""The report of a grid: compare.md, compare.csv, compare.json and compare.png, from the result.json of its cells.

If the test annotation has tags, the queries of each tag have a table of their own, with the whole gallery.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from adaclip_finetune.compare.grid import Grid
from adaclip_finetune.compare.grid_cell import Cell
from adaclip_finetune.config.schema import show
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.queries import evaluation_queries
from adaclip_finetune.durable import replacing, write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.bootstrap import RESAMPLES, Interval, difference_over_seeds, recall_over_seeds
from adaclip_finetune.evaluation.metrics import DirectionMetrics, IntArray
from adaclip_finetune.evaluation.tasks.base import value
from adaclip_finetune.peft.report import TrainableReport

FIGURES = tuple(f"{direction}.{name}" for direction in ("t2v", "v2t") for name in ("R@1", "R@5", "R@10", "MedR"))
_NOTHING = "–"


@dataclass(frozen=True, eq=False)
class Summary:
    """A line of the table: a method with its chosen value over its seeds, or zero-shot CLIP.

    `figures` (those of `FIGURES`) are means over the runs; `ranks` (S, Q) are text to video. A method without any
    finished run has no figures, and `note` says why. Costs are None for zero-shot. Lines of a tag have no figures of
    video to text. `baseline` is the zero-shot line with the frames of the method.
    """

    name: str
    seeds: Sequence[int] = ()
    figures: dict[str, float] | None = None
    ranks: IntArray | None = None
    videos: IntArray | None = None
    interval: Interval | None = None
    parameters: TrainableReport | None = None
    adapter_bytes: int | None = None
    seconds_per_step: float | None = None
    memory_mib: float | None = None
    searched: str = _NOTHING
    note: str = ""
    baseline: Summary | None = None
    minus_reference: tuple[float, Interval] | None = None
    minus_zero_shot: tuple[float, Interval] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the line for JSON and CSV."""
        parts = self.parameters
        first, zero = (found or (None, (None, None)) for found in (self.minus_reference, self.minus_zero_shot))
        low, high = self.interval or (None, None)
        return {
            "method": self.name,
            "seeds": len(self.seeds),
            "queries": None if self.ranks is None else self.ranks.shape[1],
            "trainable": parts and parts.all.trainable,
            "trainable_percent": parts and parts.all.percent,
            "trainable_of_clip": parts and parts.clip.trainable,
            "trainable_of_clip_percent": parts and parts.clip.percent,
            "adapter_bytes": self.adapter_bytes,
            **{name: self.figures and self.figures.get(name) for name in FIGURES},
            **{"t2v.R@1 low": low, "t2v.R@1 high": high},
            **{"minus_reference": first[0], "minus_reference low": first[1][0], "minus_reference high": first[1][1]},
            **{"minus_zero_shot": zero[0], "minus_zero_shot low": zero[1][0], "minus_zero_shot high": zero[1][1]},
            "seconds_per_step": self.seconds_per_step,
            "memory_mib": self.memory_mib,
            "searched": self.searched,
            "note": self.note,
        }


def write_report(grid: Grid) -> str:
    """Write the four files of the report and return the tables as text. Raise UserError if that fails."""
    rows = summaries(grid)
    cells = [cell_line(grid, cell) for cell in grid.finished()]
    of_tags = {tag: of_queries(grid, rows, mask) for tag, mask in tagged(grid, rows).items()}
    text = as_markdown(grid, rows, of_tags)
    lines = {tag: [row.as_dict() for row in found] for tag, found in {"": rows, **of_tags}.items()}
    content: dict[str, Any] = {"primary": grid.primary, "reference": grid.reference, "rows": lines[""], "cells": cells}
    if of_tags:
        content["tags"] = {tag: lines[tag] for tag in of_tags}
    table = io.StringIO()
    writer = csv.DictWriter(table, ["tag", *lines[""][0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"tag": tag, **row} for tag, found in lines.items() for row in found)
    files = {
        "compare.json": json.dumps(content, indent=1, ensure_ascii=False) + "\n",
        "compare.csv": table.getvalue(),
        "compare.md": f"{text}\n![R@1 against costs](compare.png)\n",
    }
    try:
        for name, one in files.items():
            write_durably(grid.folder / name, one.encode(), shared=True)
        with replacing(grid.folder / "compare.png", shared=True) as part:
            draw([row for row in rows if row.figures], grid).savefig(part, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"output_dir: the report could not be written to {grid.folder} ({error})") from error
    return f"{text}\n{grid.folder}: {', '.join(files)}, compare.png"


def cell_line(grid: Grid, cell: Cell) -> dict[str, Any]:
    """Return what is told of a finished cell in JSON."""
    result, searched = cell.result(), {grid.setting: cell.searched} if grid.setting else {}
    line = {"method": cell.method, **searched, "seed": cell.seed, "failed": result["failed"]}
    if result["failed"]:
        return line
    found = {"validation": value(result["validation"], grid.primary), "best_epoch": result["best_epoch"]}
    costs = {name: result[name] for name in ("seconds", "seconds_per_step", "memory_mib", "adapter_bytes")}
    return {**line, **found, "test": {name: value(result["test"], name) for name in FIGURES}, **costs}


# ---- the lines ----


def summaries(grid: Grid) -> list[Summary]:
    """Return zero-shot, and a line for each method in the order of the config file, with differences."""
    baselines: dict[tuple[int, ...], Summary] = {}
    rows = []
    for method in grid.methods:
        row = summary(grid, method)
        if row.baseline is not None:
            assert row.baseline.ranks is not None
            row = replace(row, baseline=baselines.setdefault(tuple(row.baseline.ranks[0].tolist()), row.baseline))
        rows.append(row)
    lines = [*baselines.values()]
    if len(lines) == 1:  # otherwise the methods differ in frames or weights, and each name says whose it is
        lines = [replace(lines[0], name="zero-shot")]
    return with_differences(grid, [*lines, *rows])


def with_differences(grid: Grid, rows: Sequence[Summary]) -> list[Summary]:
    """Return the lines with their differences to the reference and to zero-shot."""
    name = grid.reference
    reference = next((row for row in rows if row.name == name and row.seeds), None)
    return [
        replace(row, minus_reference=difference(row, reference), minus_zero_shot=difference(row, row.baseline))
        for row in rows
    ]


def tagged(grid: Grid, rows: Sequence[Summary]) -> dict[str, NDArray[np.bool_]]:
    """Return which test queries (Q,) have each tag; {} if they have none, or no line has figures yet."""
    config = next(iter(grid.cells.values())).config
    if config.test_annot is None or not any(row.figures for row in rows):
        return {}
    result = next(result for result in map(Cell.result, grid.finished()) if not result["failed"])
    queries = evaluation_queries(load_annotations(config.test_annot), config.concat_captions)
    return queries.within(list(dict.fromkeys(result["video_of_query"]))).by_tag()


def of_queries(grid: Grid, rows: Sequence[Summary], mask: NDArray[np.bool_]) -> list[Summary]:
    """Return the lines `rows` for some of the queries (Q,) alone, text to video."""

    def only(row: Summary) -> Summary:
        if row.ranks is None or row.videos is None:
            return row
        ranks, videos = row.ranks[:, mask], row.videos[mask]
        runs = [DirectionMetrics(of_run).as_dict() for of_run in ranks]
        figures = {f"t2v.{name}": statistics.mean(run[name] for run in runs) for name in ("R@1", "R@5", "R@10", "MedR")}
        interval = recall_over_seeds(ranks, videos)[1]
        baseline = row.baseline and only(row.baseline)
        return replace(row, figures=figures, ranks=ranks, videos=videos, interval=interval, baseline=baseline)

    return with_differences(grid, [only(row) for row in rows])


def summary(grid: Grid, method: str) -> Summary:
    """Return the line of a method without differences."""
    finished = [cell for cell in grid.searching(method) if cell.is_finished]
    if not grid.is_searched(method):
        return Summary(method, note=f"{len(finished)} of {len(grid.values(method))} values tried")
    best = grid.chosen(method)
    if best is None:
        reason = finished[0].result()["failed"].splitlines()[0]
        return Summary(method, note=f"FAILED with every value: {reason}")
    cells = [cell for cell in grid.of(method, best.searched) if cell.is_finished]
    good = [(cell.seed, cell.result()) for cell in cells if not cell.result()["failed"]]
    results = [result for _, result in good]
    first, videos = results[0], np.unique(results[0]["video_of_query"], return_inverse=True)[1].reshape(-1)
    ranks = np.array([result["ranks"]["t2v"] for result in results])
    adapters = [result["adapter_bytes"] for result in results if result["adapter_bytes"] is not None]
    notes = [f"{len(cells) - len(good)} of {len(cells)} seeds failed"] if len(good) < len(cells) else []
    if len(cells) < grid.settings.seeds:
        notes.append(f"{len(cells)} of {grid.settings.seeds} seeds so far")
    if failed := [show(cell.searched) for cell in finished if cell.result()["failed"]]:
        notes.append(f"{grid.setting} {', '.join(failed)} failed")
    return Summary(
        method,
        [seed for seed, _ in good],
        {name: statistics.mean(value(result["test"], name) for result in results) for name in FIGURES},
        ranks,
        videos,
        recall_over_seeds(ranks, videos)[1],
        TrainableReport.from_dict(first["parameters"]),
        max(adapters, default=None),
        statistics.median(result["seconds_per_step"] for result in results),
        max(result["memory_mib"] for result in results),
        show(best.searched) + mark(grid, method, best) if grid.setting else _NOTHING,
        "; ".join(notes),
        zero_shot_summary(method, first, videos),
    )


def mark(grid: Grid, method: str, best: Cell) -> str:
    """Return " (edge)" if the chosen value is the lowest or highest, " (all equal)" if all values did
    equally well, " (given)" if there was only one."""
    figures, values = {grid.validation(cell) for cell in grid.searching(method)}, grid.values(method)
    if len(values) == 1:
        return " (given)"
    if len(figures) == 1:
        return " (all equal)"
    numbers = [one for one in values if isinstance(one, int | float) and not isinstance(one, bool)]
    is_edge = len(numbers) == len(values) and best.searched in (min(numbers), max(numbers))
    return " (edge)" if is_edge else ""


def zero_shot_summary(method: str, result: dict[str, Any], videos: IntArray) -> Summary | None:
    """Return the line of zero-shot CLIP with the frames of a method, None if it was not measured."""
    if result["zero_shot"] is None or result["zero_shot_ranks"] is None:
        return None
    ranks = np.array([result["zero_shot_ranks"]])
    figures = {name: value(result["zero_shot"], name) for name in FIGURES}
    interval = recall_over_seeds(ranks, videos)[1]
    return Summary(f"zero-shot of {method}", figures=figures, ranks=ranks, videos=videos, interval=interval)


def difference(row: Summary, other: Summary | None) -> tuple[float, Interval] | None:
    """Return T2V R@1 of a line minus that of another one, over the seeds that both have, with its interval."""
    if other is None or other is row or row.ranks is None or other.ranks is None or row.videos is None:
        return None
    ranks, baseline = row.ranks, other.ranks
    if other.seeds:
        common = [seed for seed in row.seeds if seed in other.seeds]
        if not common:
            return None
        ranks = ranks[[list(row.seeds).index(seed) for seed in common]]
        baseline = baseline[[list(other.seeds).index(seed) for seed in common]]
    return difference_over_seeds(ranks, baseline, row.videos)


# ---- the tables ----


def as_markdown(grid: Grid, rows: Sequence[Summary], of_tags: Mapping[str, Sequence[Summary]]) -> str:
    """Return the figures and the costs as two tables, the figures of each tag, and what all of them mean."""
    settings = next(iter(grid.cells.values())).config
    costs = [["", "trained", "of all", "of CLIP", "adapter", "s/step", "peak MiB", grid.setting or "searched"]]
    for row in rows:
        if (parts := row.parameters) is not None:
            shares = [f"{parts.all.trainable:,}", f"{parts.all.percent:.2f} %", f"{parts.clip.percent:.2f} %"]
            adapter = _NOTHING if row.adapter_bytes is None else f"{row.adapter_bytes / 1e6:.2f} MB"
            step, memory = f"{row.seconds_per_step:.3f}", f"{row.memory_mib:.0f}"
            costs.append([row.name, *shares, adapter, step, memory, row.searched])
    done = f"{len(grid.finished())} of {grid.size} cells"
    shared = {"num_epochs": settings.num_epochs, "batch_size": settings.batch_size, "data set": settings.dataset}
    budget = ", ".join(f"{name} {value}" for name, value in shared.items() if name not in grid.settings.vary)
    if grid.settings.vary:
        budget += f"; NOT the same for all: {', '.join(grid.settings.vary)}"
    count = f"{len(grid.methods)} methods" if len(grid.methods) > 1 else "One method"
    lines = [f"# {count} under one recipe", "", f"{done}; {budget}", ""]
    lines += [*_aligned(_figures(grid, rows, FIGURES)), ""]
    lines += [*_aligned(costs), ""] if len(costs) > 1 else []
    for tag, found in of_tags.items():
        videos = next(row.videos for row in found if row.videos is not None)
        counts = f"{len(videos):,} captions of {len(np.unique(videos)):,} videos"
        lines += [f"## {tag}: {counts}", "", *_aligned(_figures(grid, found, FIGURES[:4])), ""]
    return "\n".join([*lines, *(f"- {line}" for line in _remarks(grid, rows)), ""])


def _figures(grid: Grid, rows: Sequence[Summary], names: Sequence[str]) -> list[list[str]]:
    """Return the head and the cells of a table of the figures `names`, of which T2V R@1 is the first."""
    titles = [name.upper().replace(".", " ") if name.endswith("R@1") else name[4:] for name in names]
    apart = [f"minus {grid.reference or 'reference'}", "minus zero-shot"]
    cells = [["", titles[0], "95 %", *titles[1:], *apart, "seeds"]]
    for row in rows:
        shown = [f"{row.figures[name]:.1f}" if row.figures else _NOTHING for name in names]
        interval = f"[{row.interval[0]:.1f}, {row.interval[1]:.1f}]" if row.interval else _NOTHING
        differences = [points(found) for found in (row.minus_reference, row.minus_zero_shot)]
        cells.append([row.name, shown[0], interval, *shown[1:], *differences, str(len(row.seeds) or _NOTHING)])
    return cells


def points(found: tuple[float, Interval] | None) -> str:
    """Return a difference with its interval as it is shown."""
    return _NOTHING if found is None else f"{found[0]:+.1f} [{found[1][0]:+.1f}, {found[1][1]:+.1f}]"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table in columns as wide as they must be: names at the left, figures at the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = [("-" * widths[0]), *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return [f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]]]


def _remarks(grid: Grid, rows: Sequence[Summary]) -> Iterator[str]:
    """Yield what the figures mean, and what is wrong with some of them."""
    yield from (f"**{row.name}**: {row.note}" for row in rows if row.note)
    for name, first in grid.after.items():
        config = grid.searching(name)[0].config
        more = f"num_epochs {config.num_epochs}, batch_size {config.batch_size}"
        yield f"{name}: goes on from the weights of {first} with the same seed, for {more} more"
    if edge := [row.name for row in rows if row.searched.endswith("(edge)")]:
        yield (
            f"edge: the best {grid.setting} of {', '.join(edge)} is the lowest or highest that was tried. A better one "
            "may lie beyond: widen search"
        )
    if equal := [row.name for row in rows if row.searched.endswith("(all equal)")]:
        yield f"all equal: {grid.setting} makes no difference on validation for {', '.join(equal)}; the first is taken"
    if grid.setting:
        values = ", ".join(map(show, grid.settings.search[grid.setting]))
        yield f"{grid.setting}: of {values}, the best {grid.primary} on validation with seed 0, the same search for all"
    seeds = f"{grid.settings.seeds} seeds" if grid.settings.seeds > 1 else "one seed, whose luck the intervals omit"
    yield f"figures: means over {seeds}, on the test split, each run at its best epoch on validation"
    yield (
        f"95 %, and the intervals of the differences in T2V R@1: {RESAMPLES:,} bootstrap draws of videos, each with "
        "all its captions, and of seeds; not corrected for the number of comparisons"
    )
    yield (
        "trained: parameters in all, frame selector and pooling included; adapter: adapter.safetensors; s/step: median "
        "time of an update, reading included, slower if several workers share the machine; peak MiB: of the device, on "
        "a CPU of the process"
    )


# ---- the picture ----


def draw(rows: Sequence[Summary], grid: Grid) -> Figure:
    """Draw T2V R@1 with its interval against trained parameters of CLIP, seconds a step and peak memory."""
    methods = [row for row in rows if row.parameters is not None]
    figure = Figure(figsize=(13, 5), layout="constrained")
    parameters, seconds, memory = figure.subplots(1, 3, sharey=True)
    sizes = [row.parameters.clip.trainable for row in methods if row.parameters]
    _draw_panel(parameters, rows, lambda row: row.parameters.clip.trainable if row.parameters else None)
    _draw_panel(seconds, rows, lambda row: row.seconds_per_step)
    _draw_panel(memory, rows, lambda row: row.memory_mib)
    smallest = min((size for size in sizes if size), default=1)
    largest = max(sizes, default=1)
    if 0 in sizes:  # a logarithmic axis has no 0
        parameters.set_xscale("symlog", linthresh=smallest / 2, linscale=0.5)
        parameters.set_xlim(-smallest / 8, 3 * max(largest, smallest))
        decades = range(math.ceil(math.log10(smallest)), math.ceil(math.log10(3 * max(largest, smallest))))
        parameters.set_xticks([0, *(10**decade for decade in decades)])
    else:
        parameters.set_xscale("log")
        parameters.set_xlim(smallest / 3, 3 * largest)
    parameters.set(xlabel="trained parameters of CLIP", ylabel="T2V R@1 in %, with 95 % interval")
    seconds.set_xlabel("seconds of a training step")
    memory.set_xlabel("peak memory in MiB")
    for axes, places in (
        (seconds, [row.seconds_per_step for row in methods if row.seconds_per_step]),
        (memory, [row.memory_mib for row in methods if row.memory_mib]),
    ):
        # A span of at least a fifth of the highest cost, so that small differences look small.
        low, high = min(places, default=0.0), max(places, default=1.0)
        margin = max(0.06 * (high - low), 0.1 * high - (high - low) / 2)
        axes.set_xlim(max(0, low - margin), high + margin)
    handles, labels = parameters.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return figure


def _draw_panel(axes: Axes, rows: Sequence[Summary], place: Callable[[Summary], float | None]) -> None:
    markers = "osD^vP*X<>"
    number = 0
    for row in rows:
        assert row.figures is not None and row.interval is not None
        mean, (low, high) = row.figures["t2v.R@1"], row.interval
        x = place(row)
        if row.parameters is None:
            axes.axhspan(low, high, color="0.5", alpha=0.12, linewidth=0)
            axes.axhline(mean, color="0.4", linestyle=":", label=row.name)
        elif x is not None:
            look: Any = {"color": f"C{number % 10}", "marker": markers[(number + number // 10) % len(markers)]}
            bars = [[max(mean - low, 0)], [max(high - mean, 0)]]
            axes.errorbar([x], [mean], bars, label=row.name, capsize=3, markersize=7, linewidth=1.2, **look)
        number += row.parameters is not None
    axes.grid(alpha=0.3)
