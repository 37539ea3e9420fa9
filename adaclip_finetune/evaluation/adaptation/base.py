"""The interface of an adaptation: it changes the model for some queries, and restores it afterwards.

A new adaptation is one file beside this one, a settings class and a line in `config/choices/`; docs/extending.md
has a complete example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from adaclip_finetune.config import ChoiceSettings, Config
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.objectives.base import Opened

Direction = Literal["t2v", "v2t"]


class QueryBatch(NamedTuple):
    """Queries of one direction: texts that are to find videos (t2v), or videos that are to find texts (v2t).

    `logits()` returns the logits (q, N) of the queries and N candidates by the model as it is at the moment. They have
    gradients; the vectors of the candidates are constants. `others()` returns the cosines (q, N) by each of the
    adaptation's other models, of the candidates whose logits were returned last.
    """

    direction: Direction
    logits: Callable[[], Tensor]
    others: Callable[[], Sequence[Tensor]] = tuple


class Adaptation(ABC):
    """Called with queries, it returns a context manager; inside it, the model is adapted to these queries.

    The adaptation may compute gradients. The task calls the adapted model without gradients.
    """

    directions: Sequence[Direction] = ("t2v",)
    """The directions whose queries the model is adapted to. In the other one it is measured as it is."""

    queries_at_once: int | None = None
    """How many queries the model is adapted to at a time. None: a whole batch of the evaluation."""

    in_order = False
    """Whether what a query gets depends on the queries before it. Then one process adapts, and nothing is kept."""

    views = 1
    """How many views of each video the model is adapted to, in classification: the video, and random parts of it."""

    changes_texts = False
    """Whether the vectors of classes change while the model adapts to a video."""

    others: Sequence[Opened | None] = ()
    """Other models that also embed all texts and videos. None stands for the model before it is adapted."""

    def __init__(self, settings: ChoiceSettings) -> None:
        self.settings = settings

    def start(self, config: Config, open_other: Callable[[str], Opened]) -> None:  # noqa: B027 (most open nothing)
        """Open `others`; by default there are none. `open_other(source)` opens a run folder, a checkpoint or a CLIP.

        Raise UserError for what the settings name and is not there.
        """

    def prepared(self, model: VideoRetriever) -> AbstractContextManager[None]:
        """Return the context in which the adaptation is called for all queries of an evaluation; by default empty.

        Inside it, what adapting needs may be attached to the model. The model is restored on exit.
        """
        return nullcontext()

    def certain(self, logits: Tensor) -> Tensor:
        """Return which of the views with these logits (n, C) the model is adapted to; by default all."""
        return torch.arange(len(logits), device=logits.device)

    @abstractmethod
    def __call__(self, model: VideoRetriever, queries: QueryBatch) -> AbstractContextManager[None]:
        """Adapt the model to these queries."""
