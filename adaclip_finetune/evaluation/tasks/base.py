"""The interface of a task: it measures a model on an annotated split, and names the figure that decides.

A new task is one file beside this one, a settings class and a line in `config/choices/`; docs/extending.md has a
complete example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.config import Config
from adaclip_finetune.data.preprocess import Views
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.evaluation.metrics import IntArray
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.objectives.base import Opened
from adaclip_finetune.weights.loaded import LoadedClip


class Figures(Protocol):
    """The figures that a task measured, small enough to be kept for the whole run."""

    def as_dict(self) -> dict[str, Any]:
        """Return named figures for metrics.json, possibly nested: `{"t2v": {"R@1": 9.2}}` holds `t2v.R@1`."""

    def as_state(self) -> dict[str, Any]:
        """Return everything, exactly, as JSON can hold it."""


class Report(Protocol):
    """The result of one evaluation: its figures, and whatever else the task keeps of it."""

    @property
    def seconds(self) -> float: ...

    @property
    def figures(self) -> Figures: ...

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for metrics.json."""


class QueryRanks(NamedTuple):
    """The rank (Q,) of each query's right answer, and the video (Q,) that the query is about.

    Intervals and p-values are computed from these. `videos` is None if each query has a video of its own. `names` says
    what R@1 and so on are called in the figures; by default they have these names.
    """

    ranks: IntArray
    videos: IntArray | None
    names: Mapping[str, str] = {}

    def of(self, queries: NDArray[np.bool_]) -> QueryRanks:
        """Return the ranks of some of the queries (Q,) alone; the gallery is the same."""
        return self._replace(ranks=self.ranks[queries], videos=None if self.videos is None else self.videos[queries])


class Task(ABC):
    """Measures models on one split, any number of times, in all processes together; its readers live until `close`.

    `primary` is the figure that chooses the best epoch, trial and interpolation. The settings class of the task lists
    the figures that it can measure.
    """

    def __init__(self, config: Config, split: EvaluationSplit, loaded: LoadedClip, views: Views, label: str) -> None:
        self.config, self.split, self.loaded, self.views, self.label = config, split, loaded, views, label
        self.primary = config.primary_figure
        self.greater_is_better = config.figures[self.primary]
        self.curves: Sequence[str] = (self.primary,)  # the figures that curves.png shows
        self.columns: Sequence[str] = tuple(config.figures)  # the figures that `adaclip evaluate` shows

    def start(self, open_other: Callable[[str], Opened]) -> None:  # noqa: B027 (most tasks need one model only)
        """Open what is needed besides the model to measure. `open_other(source)` opens a run, a checkpoint or a CLIP.

        Called once, before the task measures. Raise UserError for what the settings name and is not there.
        """

    @abstractmethod
    def __call__(self, model: VideoRetriever, keep: Path | None = None) -> Report:
        """Measure the model, in evaluation mode, and leave it in that mode. The caller sets autocast.

        `keep` is a folder for finished work (only that of the main process counts): the same call continues there
        after an interruption. Raises UserError, in all processes.
        """

    @abstractmethod
    def one_line(self, figures: Figures) -> str:
        """Return the figures in one line for the screen."""

    @abstractmethod
    def table(self, rows: Mapping[str, Figures]) -> str:
        """Return a table of several models on this split, one line for each."""

    @abstractmethod
    def gallery(self, report: Report) -> str:
        """Return what stands below the table: what was measured on the first line, remarks on further ones."""

    @staticmethod
    @abstractmethod
    def figures_from_state(state: Mapping[str, Any]) -> Figures:
        """Make the figures from what `Figures.as_state` returned."""

    @staticmethod
    def texts_of(config: Config, split: EvaluationSplit) -> Sequence[str]:
        """Return the texts that the task embeds, by default those of the split.

        Raise UserError for a split that the task cannot measure.
        """
        return split.queries.texts

    def ranks(self, report: Report) -> Mapping[str, QueryRanks]:
        """Return the ranks behind the figures R@K, MedR and MeanR, by the part of the name before these; default {}.

        Ranks behind figures with names of their own, which `QueryRanks.names` has, are found by that of R@1.
        """
        return {}

    def is_better(self, figures: Figures, best: Figures | None) -> bool:
        """Return whether the primary figure is strictly better: of equal figures, the earlier one stays the best."""
        if best is None:
            return True
        one, other = value(figures.as_dict(), self.primary), value(best.as_dict(), self.primary)
        return one > other if self.greater_is_better else one < other

    def close(self) -> None:  # noqa: B027 (a task without reading processes has nothing to end)
        """End the reading processes."""


def value(figures: Mapping[str, Any], name: str) -> float:
    """Return the figure with a dotted name from what `Figures.as_dict` returned."""
    found: Any = figures
    for part in name.split("."):
        found = found[part]
    return float(found)
