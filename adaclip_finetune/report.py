"""What a person looks at after a run: the table of results and the pictures."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from adaclip_finetune.evaluation.tasks.base import value
from adaclip_finetune.peft.importance import TensorImportance


def draw_curves(path: Path, events: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> None:
    """curves.png: loss, learning rate and these figures of the validation, over updates."""
    train = [event for event in events if event["event"] == "train"]
    validation = [event for event in events if event["event"] == "validation"]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, rate, measured = figure.subplots(1, 3)
    steps = [event["step"] for event in train]
    loss.plot(steps, [event["loss"] for event in train], color="0.7", linewidth=0.8)
    loss.plot(steps, _smoothed([event["loss"] for event in train]), color="tab:blue")
    loss.set_title("training loss (and its running mean)")
    for group in sorted({name for event in train for name in event["lr"]}):
        # The warm-up begins at 0, which a logarithmic axis cannot show.
        points = [(event["step"], event["lr"][group] or math.nan) for event in train if group in event["lr"]]
        rate.plot(*zip(*points, strict=True), label=group)
    if any(value > 0 for event in train for value in event["lr"].values()):
        rate.set_yscale("log")
    rate.set_title("learning rate")
    if train:
        rate.legend(fontsize=8)
    for name, marker in zip(figures, itertools.cycle("os^v"), strict=False):
        points = [(event["step"], value(event["metrics"], name)) for event in validation]
        if points:
            measured.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=name)
    if best := [event["step"] for event in events if event["event"] == "best"]:
        measured.axvline(best[-1], color="tab:green", linewidth=0.8, linestyle="--", label="kept")
    measured.set_title("validation")
    if validation:
        measured.legend(fontsize=8)
    for axes in (loss, rate, measured):
        axes.set_xlabel("updates")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_frame_usage(path: Path, usage: NDArray[np.int64], videos: int, top_k: int) -> None:
    """frame_usage.png: of all videos of the gallery, in how many each candidate frame was chosen."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(np.arange(len(usage)), 100 * usage / videos)
    axes.axhline(100 * top_k / len(usage), color="tab:red", linewidth=1, label="if all were alike")
    axes.set(xlabel="candidate frame, in time order", ylabel="chosen in % of videos")
    axes.set_title(f"Frames chosen, {top_k} of {len(usage)}")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def write_importance(csv_path: Path, picture: Path, rows: Sequence[TensorImportance]) -> None:
    """ibs_parameters.csv and ibs_parameters.png: each candidate tensor's importance, and whether it is retained."""
    columns = list(rows[0].__dataclass_fields__)
    with csv_path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([getattr(row, column) for column in columns] for row in rows)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for retained, colour, label in ((False, "0.7", "frozen"), (True, "tab:blue", "retained")):
        shown = [row for row in rows if row.retained is retained]
        values = [row.importance if row.normalized is None else row.normalized for row in shown]
        axes.scatter([row.dim for row in shown], values, s=14, color=colour, label=f"{label} ({len(shown)} tensors)")
    axes.set(xscale="log", yscale="symlog", xlabel="parameters in the tensor", ylabel="importance as compared")
    axes.set_title("Importance-based selection")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def _smoothed(values: Sequence[float], decay: float = 0.9) -> list[float]:
    smooth: list[float] = []
    for new in values:
        smooth.append(new if not smooth else decay * smooth[-1] + (1 - decay) * new)
    return smooth
