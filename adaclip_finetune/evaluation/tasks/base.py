"""What a task is: a way to measure a model on an annotated split, and the figure that decides.

A new task is one file beside this one, a settings class and a line in `config/choices.py`; docs/extending.md shows a
complete one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from adaclip_finetune.config import Config
from adaclip_finetune.data.preprocess import Views
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.weights.loaded import LoadedClip


class Figures(Protocol):
    """What a task found, small enough to be remembered."""

    def as_dict(self) -> dict[str, Any]:
        """Named figures for metrics.json, possibly nested: `{"t2v": {"R@1": 9.2}}` holds `t2v.R@1`."""

    def as_state(self) -> dict[str, Any]:
        """All of it exactly, as JSON can hold it."""


class Report(Protocol):
    """What one evaluation found: its figures, and whatever else the task keeps of it."""

    @property
    def seconds(self) -> float: ...

    @property
    def figures(self) -> Figures: ...

    def as_dict(self) -> dict[str, Any]:
        """The figures for metrics.json."""


class Task(ABC):
    """Measures models on one split, time and again, in all processes together; its readers live until `close`.

    `primary` is the figure that chooses the best epoch, trial and share; what a task can measure its settings class
    says.
    """

    def __init__(self, config: Config, split: EvaluationSplit, loaded: LoadedClip, views: Views, label: str) -> None:
        self.config, self.split, self.loaded, self.views, self.label = config, split, loaded, views, label
        self.primary = config.primary_figure
        self.greater_is_better = config.figures[self.primary]
        self.curves: Sequence[str] = (self.primary,)  # the figures that curves.png shows

    @abstractmethod
    def __call__(self, model: VideoRetriever, keep: Path | None = None) -> Report:
        """Put the model into evaluation mode, leave it there and measure it; autocast is the caller's.

        With `keep`, a folder (only the main process's counts), finished work may be kept there, so that the same call
        after an interruption goes on. Raises UserError, in all processes.
        """

    @abstractmethod
    def one_line(self, figures: Figures) -> str:
        """The figures in one line of the screen."""

    @abstractmethod
    def table(self, rows: Mapping[str, Figures]) -> str:
        """A table of several models on this split, a line each."""

    @abstractmethod
    def gallery(self, report: Report) -> str:
        """On what the figures were measured, in one line of the screen."""

    @staticmethod
    @abstractmethod
    def figures_from_state(state: Mapping[str, Any]) -> Figures:
        """What `Figures.as_state` gave."""

    def is_better(self, figures: Figures, best: Figures | None) -> bool:
        """Whether the primary figure is better, strictly: ties go to what came first."""
        if best is None:
            return True
        one, other = value(figures.as_dict(), self.primary), value(best.as_dict(), self.primary)
        return one > other if self.greater_is_better else one < other

    def close(self) -> None:  # noqa: B027 (a task that reads nothing has nothing to end)
        """End the reading processes."""


def value(figures: Mapping[str, Any], name: str) -> float:
    """The figure of a dotted name in what `Figures.as_dict` gave."""
    found: Any = figures
    for part in name.split("."):
        found = found[part]
    return float(found)
