"""The pictures of a run (curves.png, frame_usage.png, confusion.png), and pictures and tables of IBS and LISA."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from adaclip_finetune.evaluation.tasks.base import value
from adaclip_finetune.peft.base import SamplingHistory
from adaclip_finetune.peft.importance import TensorImportance

_Events = Sequence[Mapping[str, Any]]
_CLASSES_NAMED = 110


def draw_curves(path: Path, events: _Events, figures: Sequence[str]) -> None:
    """Draw the loss, the learning rates and these figures of the validation over updates (curves.png).

    `events` are the lines of metrics.jsonl. The figures of zero-shot, and of the finetuned model at the end, are drawn
    beside the validation, labelled with the split that they were measured on.
    """
    train = [event for event in events if event["event"] == "train"]
    figure = Figure(figsize=(15, 3.8), layout="constrained")
    loss, rate, measured = figure.subplots(1, 3)
    steps, losses = [event["step"] for event in train], [event["loss"] for event in train]
    loss.plot(steps, losses, color="0.75", linewidth=0.8, label="each update")
    loss.plot(steps, _running_mean(losses), color="tab:blue", label="running mean")
    loss.set(title="training loss", ylim=(0, None))
    _draw_rates(rate, train)
    _draw_validation(measured, events, figures)
    for axes in (loss, rate, measured):
        axes.set(xlabel="updates", xlim=(0, 1.03 * max(steps, default=1)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            outside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if axes is measured else {}
            axes.legend(fontsize=8, **outside)
    figure.savefig(path, dpi=120)


def _draw_rates(axes: Axes, train: _Events) -> None:
    """Draw the learning rates, one line for all parameter groups that have the same one throughout."""
    groups: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name in sorted({name for event in train for name in event["lr"]}):
        # A logarithmic axis cannot show the 0 with which the warm-up begins.
        points = tuple((event["step"], event["lr"][name]) for event in train if event["lr"].get(name))
        groups.setdefault(points, []).append(name)
    for points, names in groups.items():
        if points:
            axes.plot(*zip(*points, strict=True), label="\n".join(names), marker="." if len(points) == 1 else None)
            axes.set_yscale("log")
    if highest := max((rate for points in groups for _, rate in points), default=0):
        axes.set_ylim(bottom=min(max(rate for _, rate in points) for points in groups if points) / 100, top=highest * 2)
    axes.set_title("learning rate of the parameter groups")


def _draw_validation(axes: Axes, events: _Events, figures: Sequence[str]) -> None:
    shown: list[float] = []
    best = [event["step"] for event in events if event["event"] == "best"][-1:]
    for number, name in enumerate(figures):
        colour = f"C{number}"
        points = [(e["step"], value(e["metrics"], name)) for e in events if e["event"] == "validation"]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=f"{name}, validation")
            shown += [found for _, found in points]
        for event in events:
            if event["event"] == "finetuned" and event["split"] != "validation":
                shown.append(value(event["metrics"], name))
                label = f"{name}, best epoch on {event['split']}"
                axes.plot(best, shown[-1:], "*", color=colour, markersize=11, clip_on=False, label=label)
            elif event["event"] == "zero_shot":
                shown.append(value(event["metrics"], name))
                label = f"{name}, zero-shot on {event['split']}"
                axes.axhline(shown[-1], color=colour, linewidth=1, linestyle=":", label=label)
    for step in best:
        axes.axvline(step, color="0.5", linewidth=0.8, linestyle="--", label="best epoch")
    if shown:
        # A span of at least a quarter of the highest figure, so that small differences look small.
        low, high = min(shown), max(shown)
        margin = max(high / 8 - (high - low) / 2, 0.08 * (high - low), 1e-9)
        axes.set_ylim(max(low - margin, -margin / 10), high + margin)
    axes.set_title("validation")


def draw_frame_usage(path: Path, usage: NDArray[np.int64], videos: int, top_k: int) -> None:
    """Draw in what share of the videos each candidate frame was chosen (frame_usage.png)."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(np.arange(1, len(usage) + 1), 100 * usage / videos)
    even = 100 * top_k / len(usage)
    axes.axhline(even, color="tab:red", linewidth=1, label=f"an even choice ({even:.0f} %)")
    axes.set(xlabel="candidate frame, in time order", ylabel="chosen in this share of the videos")
    axes.set(xlim=(0.4, len(usage) + 0.6), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))
    axes.set_title(f"frames that the selector chose, {top_k} of {len(usage)} in each of {videos} videos")
    axes.legend(fontsize=8, loc="lower right", framealpha=1)
    figure.savefig(path, dpi=120)


def draw_confusion(path: Path, counts: NDArray[np.int64], classes: Sequence[str]) -> None:
    """Draw what share of each class's videos (rows) the model takes for each class (columns): confusion.png.

    Names are left out where they would be too small to read.
    """
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(18.0, 3 + 0.22 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=100, cmap="Blues", interpolation="nearest")
    figure.colorbar(image, label="share of the videos of the class, in %", shrink=0.7)
    axes.set(xlabel="answer of the model", ylabel="class of the video", title="classes taken for each other")
    if len(classes) <= _CLASSES_NAMED:
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(len(classes)), classes, fontsize=7, parse_math=False)
    figure.savefig(path, dpi=120)


def write_importance(csv_path: Path, picture: Path, rows: Sequence[TensorImportance]) -> None:
    """Write the importance of each candidate tensor of IBS, and whether it is retained, as a table and a picture."""
    columns = list(rows[0].__dataclass_fields__)
    with csv_path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([getattr(row, column) for column in columns] for row in rows)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    total = sum(row.dim for row in rows)
    for retained, colour, label in ((False, "0.7", "frozen"), (True, "tab:blue", "retained")):
        shown = [row for row in rows if row.retained is retained]
        values = [row.importance if row.normalized is None else row.normalized for row in shown]
        share = f"{label}: {len(shown)} tensors, {100 * sum(row.dim for row in shown) / total:.1f} % of the parameters"
        axes.scatter([row.dim for row in shown], values, s=14, color=colour, label=share)
    axes.set(xscale="log", xlabel="parameters in the tensor", ylabel="importance, as compared")
    if all(row.normalized is None and row.importance > 0 for row in rows):
        axes.set_yscale("log")
    axes.set_title("tensors chosen by importance (IBS)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def write_sampling(csv_path: Path, picture: Path, history: SamplingHistory) -> None:
    """Write the probabilities of tensors in each drawing of LISA, and which were drawn, as a table and a picture."""
    probabilities, drawn = history.probabilities.tolist(), history.drawn.tolist()
    with csv_path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "name", "probability", "drawn"])
        for step, shares, flags in zip(history.steps, probabilities, drawn, strict=True):
            writer.writerows([step, *row] for row in zip(history.names, shares, flags, strict=True))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(history.probabilities.T.numpy(), aspect="auto", interpolation="nearest")
    figure.colorbar(image, label="probability")
    axes.set(xlabel="drawing", ylabel="tensor, by name", title="tensors drawn by importance (LISA)")
    figure.savefig(picture, dpi=120)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Return the exponential running mean over about a twentieth of the values."""
    decay = max(0.0, 1 - 20 / max(len(values), 1))
    means: list[float] = []
    for new in values:
        means.append(new if not means else decay * means[-1] + (1 - decay) * new)
    return means
