"""`adaptation: none`: the model stays as it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from adaclip_finetune.evaluation.adaptation.base import Adaptation
from adaclip_finetune.model.retriever import VideoRetriever


class NoAdaptation(Adaptation):
    """Leave the model unchanged."""

    needs_gallery = False

    def __call__(self, model: VideoRetriever, queries: Tensor, gallery: Tensor | None) -> AbstractContextManager[None]:
        return nullcontext()
