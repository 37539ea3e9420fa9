"""The interface of an adaptation: it changes the model for some queries, and restores it afterwards.

A new adaptation is one file beside this one, a settings class and a line in `config/choices.py`; docs/extending.md
has a complete example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

from torch import Tensor

from adaclip_finetune.config import ChoiceSettings
from adaclip_finetune.model.retriever import VideoRetriever


class Adaptation(ABC):
    """Called with queries, it returns a context manager; inside it, the model is adapted to these queries.

    The adaptation may compute gradients. The task calls the adapted model without gradients.
    """

    queries_at_once: int | None = None
    """How many queries the model is adapted to at a time. None: a whole batch of the evaluation."""

    needs_gallery = True
    """Whether the adaptation uses `gallery`. If not, it gets None."""

    def __init__(self, settings: ChoiceSettings) -> None:
        self.settings = settings

    @abstractmethod
    def __call__(self, model: VideoRetriever, queries: Tensor, gallery: Tensor | None) -> AbstractContextManager[None]:
        """Adapt the model to `queries`, token ids (q, L). `gallery` is what its scorer keeps of all videos (V, …)."""
