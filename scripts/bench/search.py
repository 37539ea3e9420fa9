"""What a text query costs: vectors that were made in advance, against matching that depends on the query.

    pip install faiss-cpu && python scripts/bench/search.py

Synthetic embeddings, the same for all rows: V videos of K frames of width D, float32, in memory. A video is a point of
a 64-dimensional space; its frames and the query are that point with noise. One query at a time, as somebody waits for
it; of each row the best time of the rounds, in which all rows take turns. The rows:

    exact        (a) MLP-Score in advance: gallery (V, D) times query, then the 10 best; once by torch, whose MKL keeps
                 to one thread here, and once by NumPy, whose OpenBLAS takes two for a large gallery
    flat, hnsw   (b) the same vectors in FAISS, with recall@10 against exact
    qscore       (c) frames weighed by their cosine to the query (CLIP-Hitchhiker, Bain et al. 2022)
    attention    (c) cross-attention of the query over the frames (X-Pool, Gorti et al. 2022), with one head
    mlp again    (d) MLP-Score's weights computed anew for every query, although they do not depend on it

(c) is written for speed: each frame is read from memory once, keys are folded into the query and values into the
output, which changes nothing (checked at the start). Times are held against a floor: the bytes of the gallery over the
copy rate, that of `copy_` between two buffers of the gallery's size in the same rounds, in which what is read and what
is written both count. A pass that only reads can be faster than a copy, so a ratio below 1 is possible.

Last, `VideoIndex.search` is held against `exact`: it also makes a `Hit` of each video that it finds, whose row is
parsed when it is found first.

Beside the time there is the CPU time of all threads together, the least of the rounds; ratios are of both. On a
machine that does other work it says more.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

# Read when the libraries are loaded: two threads for all of them, and who waits for work sleeps, or its waiting would
# be on the account of the next row.
os.environ["OMP_NUM_THREADS"] = "2"
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["OPENBLAS_THREAD_TIMEOUT"] = "4"  # 2 to this power, in cycles

import faiss
import torch
import torch.nn.functional as F
from torch import Tensor

from adaclip_finetune.model.pooling import MlpScore
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.stored import IndexInfo, write_index

FOUND = 10
AGAINST = ("qscore", "attention", "mlp again")
LATENT = 64
BLOCK = 256  # videos: their frames, 6 MB, stay in the cache between the two passes over them
MLP_BLOCK = 128


class Gallery(NamedTuple):
    """Frames (V, K, D), and of each 1 / length, mean and 1 / deviation (V, K)."""

    frames: Tensor
    inverse_length: Tensor
    mean: Tensor
    inverse_deviation: Tensor


class Attention(NamedTuple):
    """The weights of the matcher, (D, D): what makes query, key, value and output of normalised vectors, and the layer
    behind it."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    layer: Tensor
    folded: Tensor  # value and output in one


@dataclass
class Row:
    """What is measured, and what of the gallery it reads, in bytes."""

    run: Callable[[Tensor], Tensor]  # query (D,) → the FOUND best rows
    touched: float
    rounds: int
    wall: list[float] = field(default_factory=list)  # seconds
    processor: list[float] = field(default_factory=list)

    def measure(self, query: Tensor) -> Tensor:
        started, worked = time.perf_counter(), time.process_time()
        found = self.run(query)
        self.wall.append(time.perf_counter() - started)
        self.processor.append(time.process_time() - worked)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    for name, default in (("frames", 12), ("width", 512), ("rounds", 15), ("queries", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    if min(a.videos) < FOUND:
        parser.error(f"--videos: at least {FOUND}, which are what is found")
    torch.manual_seed(0)
    with torch.inference_mode():
        check(a.width)
        for count in a.videos:
            measure(count, a)


def measure(count: int, a: argparse.Namespace) -> None:
    """Print the table of one size."""
    weights = random_attention(a.width)
    gallery, queries = make_gallery(count, a.frames, a.width, a.queries)
    pooling, frame_bytes = MlpScore(a.width, 1.0), gallery.frames.numel() * 4
    again = Row(lambda _: embedded(gallery, pooling), frame_bytes, max(3, min(a.rounds, 10_000 // count)))
    vectors = again.measure(queries[0])
    flat, started = faiss_index("Flat", vectors), time.process_time()
    graph = faiss_index("HNSW32,Flat", vectors)
    built = time.process_time() - started
    other = torch.empty_like(vectors)

    def by(nearest: object) -> Callable[[Tensor], Tensor]:
        return lambda query: torch.from_numpy(nearest.search(query[None].numpy(), FOUND)[1][0])  # type: ignore[attr-defined]

    few = max(5, min(a.rounds, 50_000 // count))
    own = vectors.numel() * 4
    rows = {
        "exact": Row(lambda query: best(vectors @ query), own, a.rounds),
        "exact, NumPy": Row(lambda query: best(product(vectors, query)), own, a.rounds),
        "flat": Row(by(flat), own, a.rounds),
        "hnsw": Row(by(graph), visited(graph, queries) * a.width * 4, a.rounds),
        "qscore": Row(lambda query: best(qscore(gallery, query)), frame_bytes, few),
        "attention": Row(lambda query: best(attention(gallery, weights, query)), frame_bytes, few),
        "mlp again": again,
        "copy": Row(lambda query: other.copy_(vectors), 2 * own, a.rounds),
        "read": Row(lambda query: vectors.sum(), own, a.rounds),
    }
    for turn in range(a.rounds + 1):  # the first one warms up
        for row in rows.values():
            if turn == 0 and row is not again:
                row.run(queries[turn])
            elif len(row.wall) < row.rounds:
                row.measure(queries[turn % len(queries)])
    recalls = {kind: recall(vectors, queries, by(index)) for kind, index in (("flat", flat), ("hnsw", graph))}
    tell(count, a, rows, own, recalls)
    seconds = video_index(vectors, queries)
    against = ", ".join(
        f"{name} {1000 * s:.3f} ms ({s / min(rows['exact'].wall):.1f} x)" for name, s in seconds.items()
    )
    print(f"VideoIndex.search of {FOUND}, against exact: {against}")
    print(f"exact, {len(queries)} queries at once: {1000 * batched(vectors, queries):.4f} ms a query; ", end="")
    print(f"the graph was built in {built:.1f} s of CPU time\n", flush=True)


def faiss_index(kind: str, vectors: Tensor) -> faiss.Index:
    """Return a FAISS index of the vectors (V, D), searched by inner product."""
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efConstruction = index.hnsw.efSearch = 128
    index.add(vectors.numpy())
    return index


def tell(count: int, a: argparse.Namespace, rows: dict[str, Row], own: int, recalls: dict[str, float]) -> None:
    """Markdown."""
    wall, processor = ({name: min(getattr(row, of)) for name, row in rows.items()} for of in ("wall", "processor"))
    rate, floor = 2 * own / wall["copy"], wall["copy"] / 2
    print(f"V = {count:,}, K = {a.frames}, D = {a.width}, {torch.get_num_threads()} threads: ", end="")
    print(f"copy {rate / 1e9:.1f} GB/s (read + written), reading alone {own / wall['read'] / 1e9:.1f} GB/s, ", end="")
    print(f"floor {1000 * floor:.3f} ms, copy's CPU time {1000 * processor['copy']:.3f} ms\n")
    print("| | ms | CPU ms | MB read | qscore ÷ it | attention ÷ it | mlp again ÷ it | ÷ floor | recall@10 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        if name in ("copy", "read"):
            continue
        ratios = [f"{of[other] / of[name]:.3g}" for other in AGAINST for of in (wall, processor)]
        against = [" / ".join(pair) for pair in zip(ratios[::2], ratios[1::2], strict=True)]
        floors = f"{wall[name] / floor:.2f} / {2 * processor[name] / processor['copy']:.2f}"
        found = f"{100 * recalls[name]:.1f}" if name in recalls else "100" if name.startswith("exact") else ""
        cells = [f"{1000 * wall[name]:.3f}", f"{1000 * processor[name]:.3f}", f"{row.touched / 1e6:.3g}"]
        print(f"| {' | '.join([name, *cells, *against, floors, found])} |")
    print(flush=True)


def make_gallery(count: int, frames: int, width: int, queries: int) -> tuple[Gallery, Tensor]:
    """Random, and queries (Q, D) of length 1 of videos spread over the gallery."""
    basis = torch.randn(LATENT, width) / LATENT**0.5
    points = torch.randn(count, LATENT) @ basis
    pixels, length, mean, deviation = torch.empty(count, frames, width), *torch.empty(3, count, frames)
    for rows in blocks(count, BLOCK):
        noise = 0.5 * torch.randn(len(points[rows]), frames, LATENT) @ basis + 0.1 * torch.randn(1, frames, width)
        pixels[rows] = points[rows, None] + noise
        length[rows] = pixels[rows].norm(dim=-1)
        deviation[rows], mean[rows] = torch.std_mean(pixels[rows], dim=-1, correction=0)
    spread = torch.arange(queries) * count // queries
    asked = F.normalize(points[spread] + 0.5 * torch.randn(queries, LATENT) @ basis, dim=-1)
    return Gallery(pixels, 1 / length, mean, 1 / deviation), asked


def qscore(gallery: Gallery, query: Tensor) -> Tensor:
    """Cosines (V,) of the query (D,) to each video, whose frames are weighed by the softmax of their own cosines."""
    scores = torch.empty(len(gallery.frames))
    for rows in blocks(len(scores), BLOCK):
        frames = gallery.frames[rows]
        products = frames @ query
        weights = (products * gallery.inverse_length[rows]).softmax(dim=1)
        pooled = torch.bmm(weights[:, None], frames)[:, 0]
        scores[rows] = (weights * products).sum(dim=1) / pooled.norm(dim=1)
    return scores


def attention(gallery: Gallery, weights: Attention, query: Tensor) -> Tensor:
    """Cosines (V,) of the query (D,) to each video, pooled by attention from the query over the video's frames.

    With n(x) the normalisation of a layer: a = softmax(n(q)W_Q · n(f)W_K / √D) over frames, r = n(Σ a n(f)W_V W_O),
    z = n(r + rW), cosine(q, z).
    """
    width = len(query)
    asked = weights.key @ (F.layer_norm(query, (width,)) @ weights.query) / width**0.5  # key folded into the query
    scores, total = torch.empty(len(gallery.frames)), asked.sum()
    for rows in blocks(len(scores), BLOCK):
        frames, mean, inverse = gallery.frames[rows], gallery.mean[rows], gallery.inverse_deviation[rows]
        shares = ((frames @ asked - mean * total) * inverse).softmax(dim=1) * inverse
        pooled = torch.bmm(shares[:, None], frames)[:, 0] - (shares * mean).sum(dim=1, keepdim=True)
        found = F.layer_norm(pooled @ weights.folded, (width,))
        scores[rows] = F.cosine_similarity(F.layer_norm(found + found @ weights.layer, (width,)), query[None])
    return scores


def embedded(gallery: Gallery, pooling: MlpScore) -> Tensor:
    """The vectors (V, D), of length 1, of all videos: what indexing does once, and `mlp again` for each query. (That it
    then multiplies them by the query goes without measuring.)"""
    vectors = torch.empty(gallery.frames.shape[0], gallery.frames.shape[2])
    for rows in blocks(len(vectors), MLP_BLOCK):
        vectors[rows] = F.normalize(pooling(gallery.frames[rows])[0], dim=-1)
    return vectors


def product(vectors: Tensor, query: Tensor) -> Tensor:
    """Rows (V, D) times query (D,), by NumPy."""
    return torch.from_numpy(vectors.numpy() @ query.numpy())


def best(scores: Tensor) -> Tensor:
    """The rows of the FOUND highest."""
    return scores.topk(FOUND).indices


def batched(vectors: Tensor, queries: Tensor) -> float:
    """Seconds a query of the exact search of all of them together."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        (queries @ vectors.T).topk(FOUND)
        seconds.append(time.perf_counter() - started)
    return min(seconds) / len(queries)


def video_index(vectors: Tensor, queries: Tensor) -> dict[str, float]:
    """Return the least seconds of `VideoIndex.search`, for videos that are found the first time and again."""
    frames = [{"index": 8 * n, "time": n / 3, "weight": 1 / 12} for n in range(12)]
    row = {"path": "/videos/v.mp4", "size": 1, "mtime_ns": 1, "duration": 4.0, "captions": ["two dogs run"] * 5}
    rows = [row | {"id": f"v{n}", "frames": frames, "best": 0, "thumb": "v.jpg"} for n in range(len(vectors))]
    info = IndexInfo("f", "/run", {}, "/videos")
    with TemporaryDirectory() as folder:
        write_index(Path(folder), info, vectors.numpy(), rows)
        indexes = [VideoIndex.load(folder) for _ in range(5)]
    found: dict[str, list[float]] = {"first": [], "again": []}
    for index in indexes:
        for name in ("first", *["again"] * 5):
            started = time.perf_counter()
            index.search(queries[:1], FOUND)
            found[name].append(time.perf_counter() - started)
    return {name: min(seconds) for name, seconds in found.items()}


def recall(vectors: Tensor, queries: Tensor, search: Callable[[Tensor], Tensor]) -> float:
    """Of the FOUND rows that are right, the share that is found."""
    found = [len(set(best(vectors @ query).tolist()) & set(search(query).tolist())) for query in queries]
    return sum(found) / FOUND / len(queries)


def visited(graph: object, queries: Tensor) -> float:
    """How many rows the graph looks at for a query, on average."""
    faiss.cvar.hnsw_stats.reset()
    graph.search(queries.numpy(), FOUND)  # type: ignore[attr-defined]
    return float(faiss.cvar.hnsw_stats.ndis) / len(queries)


def check(width: int) -> None:
    """The folded attention gives what its formula gives word by word."""
    gallery, queries = make_gallery(8, 3, width, 2)
    weights, query = random_attention(width), queries[0]
    normalised = F.layer_norm(gallery.frames, (width,))
    keys, values = normalised @ weights.key, normalised @ weights.value
    shares = (keys @ (F.layer_norm(query, (width,)) @ weights.query) / width**0.5).softmax(dim=1)
    found = F.layer_norm((shares[..., None] * values).sum(dim=1) @ weights.output, (width,))
    written = F.cosine_similarity(F.layer_norm(found + found @ weights.layer, (width,)), query[None])
    # The normalisation of a layer adds 1e-5 to a variance of about 1, which the folded form leaves out.
    torch.testing.assert_close(attention(gallery, weights, query), written, rtol=1e-3, atol=1e-4)


def random_attention(width: int) -> Attention:
    query, key, value, output, layer = torch.randn(5, width, width) / width**0.5
    return Attention(query, key, value, output, layer, value @ output)


def blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


if __name__ == "__main__":
    main()
