"""Row `search`: finding the nearest of many videos, and opening their index."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from adaclip_finetune.bench.measure import Aim, Measured, Setup, check, in_turns
from adaclip_finetune.search.index import FILE, IndexInfo, VideoIndex, write_index
from adaclip_finetune.training.device import keep_freed_memory

_WIDTH, _FOUND, _QUERIES = 512, 10, 200


def search(setup: Setup) -> Iterator[Measured]:
    """Compare `VideoIndex.search` of one query, and of 200 at once, with NumPy, FAISS and the time to sum the matrix.

    A search has to read the whole matrix once, as its sum does. Times of 200 at once are those of one of them.
    """
    keep_freed_memory()
    for count in (50,) if setup.quick else (1_000, 10_000, 100_000):
        random = np.random.default_rng(0)
        vectors = random.standard_normal((count, _WIDTH), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        queries = vectors[:: max(1, count // _QUERIES)][:_QUERIES] + 0.02 * random.standard_normal(_WIDTH, np.float32)
        flat = faiss.IndexFlatIP(_WIDTH)
        flat.add(vectors)
        with TemporaryDirectory() as name:
            folder = Path(name)
            write_index(folder, IndexInfo("f", "/run", {}, "/videos"), vectors, [_row(n) for n in range(count)])
            index, matrix = VideoIndex.load(folder), torch.from_numpy(vectors)
            found = [[hit.video.id for hit in hits] for hits in index.search(queries, _FOUND)]
            expected = _nearest(vectors, queries)
            same = np.mean([len(set(own) & {f"v{n}" for n in row}) for own, row in zip(found, expected, strict=True)])
            check("the videos found", torch.tensor(same), torch.tensor(float(min(_FOUND, count))), 0.01)
            one = in_turns(
                setup,
                {
                    "sum": matrix.sum,
                    "NumPy": partial(_nearest, vectors, queries[:1]),
                    "FAISS": partial(flat.search, queries[:1], _FOUND),
                    "ours": partial(index.search, queries[:1], _FOUND),
                },
                calls=1 if setup.quick else 5,
            )
            one["1.2 x sum + 0.2 ms"] = [1.2 * seconds + 2e-4 for seconds in one["sum"]]
            many = in_turns(
                setup,
                {
                    "sum": matrix.sum,
                    "NumPy": partial(_nearest, vectors, queries),
                    "FAISS": partial(flat.search, queries, _FOUND),
                    "ours": partial(index.search, queries, _FOUND),
                },
            )
            for name in ("NumPy", "FAISS", "ours"):
                many[name] = [seconds / len(queries) for seconds in many[name]]
            opening = in_turns(
                setup, {"reading the file": (folder / FILE).read_bytes, "ours": partial(VideoIndex.load, folder)}
            )
        against = [Aim("ours", "NumPy"), Aim("ours", "FAISS")]
        yield Measured(f"one query, {count:,} videos", one, [Aim("ours", "1.2 x sum + 0.2 ms", 1), *against])
        yield Measured(f"{len(queries)} queries at once, {count:,} videos", many, [Aim("ours", "sum", 5), *against])
        yield Measured(f"opening {count:,} videos", opening, [Aim("ours", "reading the file")])


def _nearest(vectors: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the numbers of the nearest vectors (V, D) to each query (Q, D), best first: (Q, 10)."""
    scores = queries @ vectors.T
    rows = np.arange(len(scores))[:, None]
    best = np.argpartition(-scores, min(_FOUND, scores.shape[1] - 1), axis=1)[:, :_FOUND]
    order: NDArray[np.int64] = best[rows, np.argsort(-scores[rows, best], axis=1)]
    return order


def _row(number: int) -> dict[str, Any]:
    frames = [{"index": 8 * n, "time": n / 3, "weight": 1 / 12} for n in range(12)]
    video = {"path": "/videos/v.mp4", "size": 1, "mtime_ns": 1, "duration": 4.0, "captions": ["two dogs run"] * 5}
    return video | {"id": f"v{number}", "frames": frames, "best": 0, "thumb": "v.jpg"}
