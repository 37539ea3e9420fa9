"""Which rows are nearest to a query, by FAISS (Douze et al. 2024): exact (`flat`), or by a graph (`hnsw`, Malkov and
Yashunin 2018), which looks at a part of them."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.stored import Rows
from adaclip_finetune.strict_json import read_json

_LINKS = 32  # of a row in the graph
_CANDIDATES = 128  # kept while a row is linked, and at least so many while a query is answered
_GRAPH, _GRAPH_OF = "faiss.index", "faiss.json"


class Nearest:
    """Rows (V, D), searched by inner product. Rows in float16 stay so in memory."""

    def __init__(self, index: Any) -> None:
        self._index = index

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Queries (Q, D) → scores and rows (Q, min(k, V)), best first; row -1 for what a graph did not find."""
        k = min(k, self._index.ntotal)
        if k == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        if isinstance(self._index, faiss.IndexHNSW):
            self._index.hnsw.efSearch = max(_CANDIDATES, 2 * k)
        scores, rows = self._index.search(np.ascontiguousarray(queries, np.float32), k)
        return scores, rows


def build(vectors: Rows, kind: str) -> Nearest:
    """An index of FAISS over the rows (V, D)."""
    index = _empty(vectors.shape[1], kind, half=vectors.dtype == np.float16)
    rows = np.ascontiguousarray(vectors, np.float32)
    if not index.is_trained:
        index.train(rows)
    index.add(rows)
    return Nearest(index)


def load(folder: Path, vectors: Rows, kind: str, digest: str) -> Nearest:
    """The graph that `keep` wrote for these very vectors; else it is built, which takes a graph its time."""
    # Of the flat kind, nothing is saved by keeping a copy of the vectors.
    return (_kept(folder, digest) if kind == "hnsw" else None) or build(vectors, kind)


def keep(folder: Path, nearest: Nearest, kind: str, digest: str) -> None:
    """Write a graph beside the vectors that it is of, if it is not there. Raises OSError."""
    if kind == "hnsw" and _kept(folder, digest):
        return
    (folder / _GRAPH_OF).unlink(missing_ok=True)
    if kind == "flat":
        (folder / _GRAPH).unlink(missing_ok=True)
        return
    content = faiss.serialize_index(nearest._index).tobytes()
    write_durably(folder / _GRAPH, content)
    of = {"vectors": digest, "graph": hashlib.sha256(content).hexdigest()}
    write_durably(folder / _GRAPH_OF, json.dumps(of).encode())


def _kept(folder: Path, digest: str) -> Nearest | None:
    with suppress(OSError, UserError, TypeError, KeyError):
        content = (folder / _GRAPH).read_bytes()
        kept = read_json(folder / _GRAPH_OF)
        # FAISS's reader was not made for files that somebody altered: it is given what was written, to the byte.
        if kept["vectors"] == digest and kept["graph"] == hashlib.sha256(content).hexdigest():
            return Nearest(faiss.deserialize_index(np.frombuffer(content, np.uint8)))
    return None


def _empty(width: int, kind: str, half: bool) -> Any:
    metric: Any = faiss.METRIC_INNER_PRODUCT
    fp16: Any = faiss.ScalarQuantizer.QT_fp16
    if kind == "flat":
        return faiss.IndexScalarQuantizer(width, fp16, metric) if half else faiss.IndexFlatIP(width)
    graph = faiss.IndexHNSWSQ(width, fp16, _LINKS, metric) if half else faiss.IndexHNSWFlat(width, _LINKS, metric)
    graph.hnsw.efConstruction = _CANDIDATES
    return graph
