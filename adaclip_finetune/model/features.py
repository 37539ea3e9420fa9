"""What the model makes of texts and of videos."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaclip_finetune.model.hard_topk import Selection


class TextFeatures(NamedTuple):
    """`sentence` (T, D), the vector of each text, not normalised. `words` (T, L, D) and which of them count, bool
    `is_word` (T, L), where they were asked for."""

    sentence: Tensor
    words: Tensor | None = None
    is_word: Tensor | None = None


class VideoFeatures(NamedTuple):
    """`tokens` (B, K, D) as they are pooled; `vector` (B, D), not normalised, None if it depends on the query;
    `frame_weights` (B, N), how much each candidate frame counts in the vector, rows of sum 1; `selection` or None."""

    tokens: Tensor
    vector: Tensor | None
    frame_weights: Tensor
    selection: Selection | None


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or in float64 if they are."""
    return values if values.dtype == torch.float64 else values.float()
