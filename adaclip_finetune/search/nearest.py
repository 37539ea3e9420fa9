"""Exact search: which of many vectors have the largest products with a query, and which are equal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PRODUCTS = 2**22  # that are kept at a time, 16 MB
_CONVERTED = 2048  # float16 vectors that are converted to float32 at a time, so that they stay in the processor's cache
_COPIED = 2**15  # vectors of which the chosen ones are copied at a time
_FEW = 4  # where less than one in so many vectors is chosen, those are copied instead of comparing all


def nearest(
    vectors: NDArray[Any], queries: NDArray[np.float32], k: int, chosen: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the k largest products of each query (Q, D) with the vectors (V, D), float32 or float16, and their rows.

    Both are (Q, k), or narrower if there are fewer vectors; the largest product comes first, and equal ones in the
    order of their rows. With `chosen` (V,), only the vectors for which it is true are compared.
    """
    k = min(k, len(vectors) if chosen is None else int(np.count_nonzero(chosen)))
    if not k or not len(queries):
        return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    least = np.full((len(queries), 1), -np.inf, np.float32)  # no product below it is among the k largest
    found = []
    for rows, scores in _in_blocks(vectors, queries, chosen):
        if scores.shape[1] >= k:
            least = np.maximum(least, np.partition(scores, -k, axis=1)[:, -k, None])
        cells = np.flatnonzero(~(scores < least))
        of, at = np.divmod(cells, scores.shape[1])
        found.append((of, rows[at], scores.reshape(-1)[cells]))
    of, rows, scores = map(np.concatenate, zip(*found, strict=True))
    order = np.lexsort((rows, -scores, of))
    best = order[np.searchsorted(of[order], np.arange(len(queries)))[:, None] + np.arange(k)]
    return scores[best], rows[best]


def _in_blocks(
    vectors: NDArray[Any], queries: NDArray[np.float32], chosen: NDArray[np.bool_] | None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield rows (B,) of vectors, and their products with the queries (Q, B), block by block."""
    size = max(_CONVERTED, _PRODUCTS // len(queries))
    size = size if chosen is None else min(size, _COPIED)
    for start in range(0, len(vectors), size):
        block = vectors[start : start + size]
        if chosen is None:
            yield np.arange(start, start + len(block)), products(queries, block)
            continue
        own = np.flatnonzero(chosen[start : start + size])
        if _FEW * len(own) < len(block):
            yield start + own, products(queries, block[own])
        else:
            yield start + own, products(queries, block)[:, own]


def products(queries: NDArray[np.float32], vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Return the products of queries (Q, D) with vectors (V, D), float32 or float16: (Q, V).

    PyTorch computes them, as it does the queries: the threads of NumPy's library would wait beside those of PyTorch.
    """
    with torch.autocast("cpu", enabled=False):  # which would round to bfloat16 while a text adapts
        return _products(torch.from_numpy(np.ascontiguousarray(queries)), torch.from_numpy(vectors)).numpy()


def _products(queries: Tensor, vectors: Tensor) -> Tensor:
    if vectors.dtype == torch.float16:
        return torch.cat([_products(queries, part.float()) for part in torch.split(vectors, _CONVERTED)], dim=1)
    if len(queries) > 1:
        return (vectors @ queries.T).T.contiguous()  # much faster than `queries @ vectors.T` for few queries
    # A product for each part of the vectors: MKL uses one thread for one product of a matrix and a vector.
    parts, width = max(2, torch.get_num_threads()), vectors.shape[1]
    even = len(vectors) - len(vectors) % parts
    query = queries.expand(parts, 1, width).transpose(1, 2)
    first = torch.bmm(vectors[:even].view(parts, -1, width), query).view(1, -1)
    return torch.cat([first, queries @ vectors[even:].T], dim=1) if even < len(vectors) else first


def first_of_equal(vectors: NDArray[Any]) -> NDArray[np.int64]:
    """Return for each of the vectors (V, D) the first row with the same bytes, which may be its own: (V,)."""
    content = np.ascontiguousarray(vectors).view(np.uint8)
    missing = -content.shape[1] % 8
    words = (np.pad(content, ((0, 0), (0, missing))) if missing else content).view(np.uint64)
    factors = np.random.default_rng(0).integers(0, 2**64, words.shape[1], dtype=np.uint64)
    # Sums modulo 2^64 are quick to compute and compare, and hardly ever equal for different vectors.
    _, firsts, inverse = np.unique(words @ factors, return_index=True, return_inverse=True)
    others = np.flatnonzero(firsts[inverse] != np.arange(len(content)))
    if (content[others] != content[firsts[inverse][others]]).any():
        _, firsts, inverse = np.unique(content, axis=0, return_index=True, return_inverse=True)
    first: NDArray[np.int64] = firsts[inverse.reshape(-1)].astype(np.int64)
    return first
