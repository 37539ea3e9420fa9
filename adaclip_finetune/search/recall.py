"""What an index costs that is not exact: which share of the true nearest rows it still finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adaclip_finetune.search.nearest import Nearest, build

Vectors = NDArray[np.float32]

K = 10

_TIE = 1e-6  # of a cosine: rows that near to each other are equally right
_QUERIES = 1000  # at most


def recall_of(
    nearest: Nearest, exact: Vectors, captions: Sequence[str], encode_text: Callable[[list[str]], Tensor]
) -> tuple[float | None, str]:
    """Recall of the K nearest of the rows `exact` (V, D), and what it was measured with: the captions if there are any,
    else the rows themselves. None if there are not more than K rows, of which nothing can be missed."""
    if len(exact) <= K + 1:
        return None, ""
    if captions:
        asked = [captions[place] for place in _spread(len(captions))]
        return recall_at(K, nearest, exact, encode_text(asked).numpy()), f"{len(asked)} captions"
    own = np.array(_spread(len(exact)), np.int64)
    return recall_at(K, nearest, exact, exact[own], own), f"{len(own)} of its own vectors"


def recall_at(
    k: int, nearest: Nearest, exact: Vectors, queries: Vectors, own: NDArray[np.int64] | None = None
) -> float:
    """Of the k rows of `exact` (V, D) with the highest products with a query, the share that `nearest` finds, 0…1: the
    mean over queries (Q, D).

    A row that ties with the k-th counts as found. `own` (Q,): the row that each query is, left out of both.
    """
    more = k if own is None else k + 1
    best, _ = build(exact, "flat").search(queries, len(exact) if more > len(exact) else more)
    _, rows = nearest.search(queries, more)
    found = []
    for query, row in enumerate(rows):
        others = row[(row >= 0) & (row != (-1 if own is None else own[query]))][:k]
        found.append(int((exact[others] @ queries[query] >= best[query, -1] - _TIE).sum()) / k)
    return float(np.mean(found))


def _spread(count: int) -> list[int]:
    """At most _QUERIES of them, evenly."""
    return [place * count // min(count, _QUERIES) for place in range(min(count, _QUERIES))]
