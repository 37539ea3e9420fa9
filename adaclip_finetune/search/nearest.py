"""Nearest neighbours by FAISS (Douze et al. 2024): exact (`flat`), or by a graph (`hnsw`, Malkov and Yashunin 2018).

A graph looks at a part of the vectors only; `measure_recall` says which share of the true neighbours it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.search.storage import Vectors

if TYPE_CHECKING:
    from torch import Tensor

K = 10  # recall is measured on the K nearest

_LINKS = 32  # of a vector in the graph
_CANDIDATES = 128  # that are kept while a vector is linked; at least so many while a query is answered
_TIE = 1e-6  # cosines that differ by less are equal
_QUERIES = 1000  # at most, to measure recall


class FaissIndex:
    """Vectors (V, D) that are searched by inner product. float16 vectors stay float16 in memory."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def build(cls, vectors: Vectors, kind: str) -> FaissIndex:
        """Return an index of the vectors; building a graph of 100,000 takes minutes."""
        kinds = {"flat": ("Flat", "SQfp16"), "hnsw": (f"HNSW{_LINKS},Flat", f"HNSW{_LINKS}_SQfp16")}
        how = kinds[kind][vectors.dtype == np.float16]
        index = faiss.index_factory(vectors.shape[1], how, faiss.METRIC_INNER_PRODUCT)
        if isinstance(index, faiss.IndexHNSW):
            index.hnsw.efConstruction = _CANDIDATES
        rows = np.ascontiguousarray(vectors, np.float32)
        if not index.is_trained:
            index.train(rows)
        index.add(rows)
        return cls(index)

    @classmethod
    def load(cls, content: bytes) -> FaissIndex:
        """Return the index that `dump` gave as bytes."""
        return cls(faiss.deserialize_index(np.frombuffer(content, np.uint8)))

    def dump(self) -> bytes:
        """Return the index as bytes."""
        return bytes(faiss.serialize_index(self._index).tobytes())

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return scores and rows (Q, min(k, V)) for queries (Q, D), best first. Row -1: the graph found no more."""
        k = min(k, self._index.ntotal)
        if k == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        if isinstance(self._index, faiss.IndexHNSW):
            self._index.hnsw.efSearch = max(_CANDIDATES, 2 * k)
        scores, rows = self._index.search(np.ascontiguousarray(queries, np.float32), k)
        return scores, rows


def measure_recall(
    index: FaissIndex,
    exact: NDArray[np.float32],
    captions: Sequence[str],
    encode_text: Callable[[list[str]], Tensor],
) -> tuple[float, str] | None:
    """Return the share, 0…1, of the K rows of `exact` (V, D) with the highest product with a query that `index` finds,
    on average over queries, and in words the queries.

    The queries are the captions if there are any, else the rows themselves, each of which is then left out of its own
    result. A row that ties with the K-th counts as found. Return None for K + 1 rows or fewer, which are all found.
    """
    if len(exact) <= K + 1:
        return None
    count = len(captions) or len(exact)
    asked = [place * count // min(count, _QUERIES) for place in range(min(count, _QUERIES))]
    queries = encode_text([captions[place] for place in asked]).numpy() if captions else exact[asked]
    k = K if captions else K + 1
    best, _ = FaissIndex.build(exact, "flat").search(queries, k)
    _, rows = index.search(queries, k)
    found = []
    for query, row in enumerate(rows):
        others = row[(row >= 0) & (row != (-1 if captions else asked[query]))][:K]
        found.append((exact[others] @ queries[query] >= best[query, -1] - _TIE).sum() / K)
    return float(np.mean(found)), f"{len(asked)} captions" if captions else f"{len(asked)} of its own vectors"
