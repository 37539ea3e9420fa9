"""What an adaptation is: it changes the model for some queries, and undoes that afterwards.

A new adaptation is one file beside this one, a settings class and a line in `config/choices.py`; docs/extending.md
shows a complete one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

from torch import Tensor

from adaclip_finetune.config import ChoiceSettings
from adaclip_finetune.model.retriever import VideoRetriever


class Adaptation(ABC):
    """Called with queries, it gives a context manager within which the model is adapted to them.

    Gradients may be computed within; what a task does there with the model it does without them.
    """

    queries_at_once: int | None = None
    """How many queries the model is adapted to at a time; None: a whole batch of the evaluation."""

    needs_gallery = True
    """Whether `gallery` is looked at; if not, None is given."""

    def __init__(self, settings: ChoiceSettings) -> None:
        self.settings = settings

    @abstractmethod
    def __call__(self, model: VideoRetriever, queries: Tensor, gallery: Tensor | None) -> AbstractContextManager[None]:
        """`queries`: token ids (q, L); `gallery`: what the model's scorer keeps of all videos (V, …)."""
