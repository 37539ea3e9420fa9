"""The features of texts and videos."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaclip_finetune.model.hard_topk import Selection


class TextFeatures(NamedTuple):
    """`sentence` (T, D) is the vector of each text, not normalised.

    `words` (T, L, D) and the mask `is_word` (T, L) are None unless they were asked for.
    """

    sentence: Tensor
    words: Tensor | None = None
    is_word: Tensor | None = None


class VideoFeatures(NamedTuple):
    """`tokens` (B, K, D) are what is pooled. `vector` (B, D) is not normalised; it is None if it depends on the query.

    `frame_weights` (B, N), rows of sum 1, say how much each candidate frame counts in the vector.
    """

    tokens: Tensor
    vector: Tensor | None
    frame_weights: Tensor
    selection: Selection | None


def at_least_float32(values: Tensor) -> Tensor:
    """Return the values in float32, unless they are float64."""
    return values if values.dtype == torch.float64 else values.float()
