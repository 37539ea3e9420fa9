"""`adaptation: none`: the model stays as it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from adaclip_finetune.evaluation.adaptation.base import Adaptation, QueryBatch
from adaclip_finetune.model.retriever import VideoRetriever


class NoAdaptation(Adaptation):
    """Leave the model unchanged."""

    directions = ()

    def __call__(self, model: VideoRetriever, queries: QueryBatch) -> AbstractContextManager[None]:
        return nullcontext()
