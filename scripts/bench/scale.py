"""What large collections need: bytes, seconds, and how much of the right answer a smaller or faster index finds.

    python scripts/bench/scale.py simulated ivf_pq --videos 100000 1000000 10000000
    python scripts/bench/scale.py simulated hnsw --videos 100000 1000000
    python scripts/bench/scale.py real MODEL VIDEOS_OR_PICTURES [ANNOTATION]
    python scripts/bench/scale.py milvus --videos 10000
    python scripts/bench/scale.py cost

`simulated` and `real` need `pip install faiss-cpu`.

`simulated` builds FAISS indexes of random vectors, with one thread: HNSW (32 links, 64 candidates while building), or
IVF-PQ (√V lists, rounded down to a power of two, and a byte for every eight dimensions, trained
on a sample, filled block by block). A vector is a point of a 64-dimensional space with noise in all dimensions, and a
query is one of these points, moved. Recall is the share of the 10 exact neighbours that are among the 10, or the 100,
that are found: exact distances of the 100 then give the right order.

`real` embeds the videos, or the pictures (jpg), in a folder, and measures what float16, int8, int4 and PQ lose: which
share of the 10 exact neighbours of each vector, and of each caption of an annotation, is among the 10 that are found.

`milvus` pushes an index of simulated vectors to a file of Milvus Lite, or to --place, twice, and searches it.

`cost` prints bytes, hours and money for 10⁵, 10⁷ and 10⁸ videos, from figures that are flags.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from numpy.typing import NDArray

try:
    import faiss
except ImportError:  # `cost` and `milvus` do without
    faiss = None

Floats = NDArray[np.float32]

FOUND, AGAIN, BLOCK, QUERIES = 10, 100, 50_000, 200
LATENT, SAMPLE = 64, 100_000
SIZES = (10**5, 10**7, 10**8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    simulated = commands.add_parser("simulated")
    simulated.add_argument("kind", choices=("ivf_pq", "hnsw"))
    simulated.add_argument("--videos", type=int, nargs="+", default=[100_000])
    simulated.add_argument("--width", type=int, default=512)
    real = commands.add_parser("real")
    real.add_argument("model")
    real.add_argument("folder", type=Path)
    real.add_argument("annotation", type=Path, nargs="?")
    milvus = commands.add_parser("milvus")
    milvus.add_argument("--videos", type=int, default=10_000)
    milvus.add_argument("--width", type=int, default=512)
    milvus.add_argument("--place", help="milvus://HOST:PORT/COLLECTION")
    cost = commands.add_parser("cost")
    for name, default, what in COSTS:
        cost.add_argument(f"--{name}", type=float, default=default, help=f"{what}; default {default}")
    a = parser.parse_args()
    if faiss is None and a.command in ("simulated", "real"):
        parser.error(f"{a.command} needs FAISS: pip install faiss-cpu")
    if a.command == "simulated":
        names = ["videos", "index", "MB", "built in CPU s", "CPU ms a query", f"recall@{FOUND}", f"among {AGAIN}"]
        print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
        for count in a.videos:
            simulate(a.kind, count, a.width)
    elif a.command == "real":
        round_real(a.model, a.folder, a.annotation)
    elif a.command == "milvus":
        fill_milvus(a.videos, a.width, a.place)
    else:
        tell_cost(a)


# ---- simulated vectors ----


def simulate(kind: str, count: int, width: int) -> None:
    """Print the rows of a collection of `count` videos."""
    points = Points(count, width)
    exact, queries = points.neighbours()
    index = make_ivf_pq(points) if kind == "ivf_pq" else make_graph(points)
    started = time.process_time()
    index.train(points.sample())
    built = time.process_time() - started
    for block in points.blocks():
        started = time.process_time()
        index.add(block)
        built += time.process_time() - started
    knob, values = ("nprobe", (4, 16, 64)) if kind == "ivf_pq" else ("efSearch", (64, 128, 256))
    for value in values:
        faiss.ParameterSpace().set_index_parameter(index, knob, value)
        started = time.process_time()
        found = np.stack([index.search(query[None], AGAIN)[1][0] for query in queries])
        each = 1000 * (time.process_time() - started) / len(queries)
        recalls = [f"{100 * recall(exact, found[:, :most]):.1f}" for most in (FOUND, AGAIN)]
        cells = [f"{count:,}", f"{kind}, {knob} {value}", f"{bytes_of(index) / 1e6:,.0f}", f"{built:,.0f}"]
        print(f"| {' | '.join([*cells, f'{each:.2f}', *recalls])} |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory so far {peak:.1f} GiB", file=sys.stderr)


class Points:
    """`count` random vectors (V, D) of length 1, made block by block, always the same."""

    def __init__(self, count: int, width: int) -> None:
        self.count, self.width = count, width
        self.basis = np.random.default_rng(0).normal(size=(LATENT, width)).astype(np.float32) / LATENT**0.5

    def blocks(self) -> Iterator[Floats]:
        """Yield all vectors."""
        for start in range(0, self.count, BLOCK):
            yield self._block(start, moved=0.0)

    def sample(self) -> Floats:
        """Return the first vectors, on which indexes are trained; their order says nothing."""
        return np.concatenate([self._block(start, 0.0) for start in range(0, min(self.count, SAMPLE), BLOCK)])

    def neighbours(self) -> tuple[NDArray[np.int64], Floats]:
        """Return the rows of the exact neighbours (Q, 10) of the queries, and the queries (Q, D)."""
        queries = self._block(0, moved=0.5)[:QUERIES]
        best, rows = np.empty((QUERIES, 0), np.float32), np.empty((QUERIES, 0), np.int64)
        for number, block in enumerate(self.blocks()):
            scores = queries @ block.T
            own = np.argpartition(-scores, FOUND)[:, :FOUND]
            best = np.concatenate([best, np.take_along_axis(scores, own, 1)], 1)
            rows = np.concatenate([rows, own + number * BLOCK], 1)
            order = np.argsort(-best)[:, :FOUND]
            best, rows = np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)
        return rows, queries

    def _block(self, start: int, moved: float) -> Floats:
        random = np.random.default_rng([1, start])
        points = random.standard_normal((min(BLOCK, self.count - start), LATENT), np.float32)
        points += moved * np.random.default_rng([2, start]).standard_normal(points.shape, np.float32)
        vectors = points @ self.basis
        vectors += 0.1 * random.standard_normal(vectors.shape, np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors


def make_graph(points: Points) -> Any:
    """Return an empty HNSW index."""
    index = faiss.index_factory(points.width, "HNSW32", faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 64
    return index


def make_ivf_pq(points: Points) -> Any:
    """Return an empty IVF-PQ index, whose training is short."""
    lists = 2 ** int(np.log2(points.count**0.5))
    index = faiss.index_factory(points.width, f"IVF{lists},PQ{points.width // 8}", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.pq.cp.niter, index.pq.cp.max_points_per_centroid = 8, 10, 64
    return index


def bytes_of(index: Any) -> int:
    """Return the size of an index on disk."""
    size = 0

    def count(part: bytes) -> None:
        nonlocal size
        size += len(part)

    faiss.write_index(index, faiss.PyCallbackIOWriter(count))
    return size


def recall(exact: NDArray[np.int64], found: NDArray[np.int64]) -> float:
    """Return the share of the right rows (Q, 10) among those that were found (Q, N)."""
    return float(np.mean([len(set(right) & set(own)) / len(right) for right, own in zip(exact, found, strict=True)]))


# ---- real vectors ----


def round_real(model: str, folder: Path, annotation: Path | None) -> None:
    """Print what rounding loses on the vectors of videos or frames."""
    vectors, captions = embed(model, folder, annotation)
    count, width = vectors.shape
    flat = faiss.index_factory(width, "Flat", faiss.METRIC_INNER_PRODUCT)
    flat.add(vectors)
    asked = {"neighbours": vectors, **({"captions": captions} if len(captions) else {})}
    exact = {name: flat.search(queries, FOUND)[1] for name, queries in asked.items()}
    print(f"{count:,} vectors of width {width}, recall@10 of their neighbours", end="")
    print(f", and of {len(captions):,} captions" if len(captions) else "")
    print(f"\n| index | bytes a vector | {' | '.join(asked)} |\n|---|---|{'---|' * len(asked)}")
    kinds = {"float16": ("SQfp16", 2 * width), "int8": ("SQ8", width), "int4": ("SQ4", width // 2)}
    kinds |= {f"PQ, {part} dimensions a byte": (f"PQ{width // part}", width // part) for part in (2, 4, 8)}
    for name, (kind, size) in kinds.items():
        index = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
        recalls = [recall(exact[one], index.search(queries, FOUND)[1]) for one, queries in asked.items()]
        print(f"| {name} | {size} | {' | '.join(f'{100 * one:.2f}' for one in recalls)} |", flush=True)


def embed(model_name: str, folder: Path, annotation: Path | None) -> tuple[Floats, Floats]:
    """Return the vectors of all pictures below a folder or, if there are none, of its videos, each of them once, and
    those of the captions of the annotation."""
    import torch

    from adaclip_finetune import load_retriever
    from adaclip_finetune.data.annotations import load_annotations
    from adaclip_finetune.search.collection import collect_folder

    model = load_retriever(model_name)
    pictures = sorted(folder.rglob("*.jpg"))
    rows = [model.encode_image(path) for path in pictures]
    rows = rows or [model.encode_video(video.path)[0] for video in collect_folder(folder).videos]
    texts = [text for entry in load_annotations(annotation) for text in entry.sentences] if annotation else []
    captions = model.encode_text(texts).numpy() if texts else np.empty((0, model.width), np.float32)
    return np.unique(torch.stack(rows).numpy(), axis=0), captions


# ---- Milvus ----


def fill_milvus(count: int, width: int, place: str | None) -> None:
    """Print the seconds of two pushes and of a search for 10 videos, and whether it finds what the folder finds."""
    from adaclip_finetune.search.index import VideoIndex
    from adaclip_finetune.search.stored import IndexInfo, write_index
    from adaclip_finetune.search.stores.places import open_index, open_store, push

    points = Points(count, width)
    frames = [{"index": 8 * n, "time": n / 3, "weight": 1 / 12} for n in range(12)]
    row = {"path": "/videos/v.mp4", "size": 1, "mtime_ns": 1, "duration": 4.0, "captions": ["two dogs run"] * 5}
    rows = [row | {"id": f"v{n}", "frames": frames, "best": 0, "thumb": "v.jpg"} for n in range(count)]
    with TemporaryDirectory() as folder:
        write_index(Path(folder), IndexInfo("f", "/run", {}, "/videos"), np.concatenate(list(points.blocks())), rows)
        place = place or f"milvus://{folder}/index.db"
        for _ in range(2):
            started = time.perf_counter()
            pushed = push(Path(folder), open_store(place))
            print(f"{pushed.stored:,} stored, {pushed.kept:,} unchanged in {time.perf_counter() - started:.1f} s")
        queries = points.neighbours()[1]
        found = {}
        for searched in (VideoIndex.load(folder), open_index(place)):
            searched.search(queries[:1], FOUND)
            started = time.perf_counter()
            hits = [searched.search(query[None], FOUND)[0] for query in queries]
            found[searched.place] = [[hit.video.id for hit in of_query] for of_query in hits]
            print(f"{searched.place}: {1000 * (time.perf_counter() - started) / len(queries):.1f} ms a query")
        first, second = found.values()
        print(f"the same 10 in the same order for {sum(map(list.__eq__, first, second))} of {len(queries)} queries")


# ---- costs ----

COSTS = (
    ("decode_s", 0.06, "CPU seconds to decode the frames of a video"),
    ("decode_all_s", 0.12, "CPU seconds to decode all its frames, for moments"),
    ("encode_s", 0.00225, "GPU seconds to select and encode the frames of a video, or of a moment"),
    ("windows", 10, "moments of a video"),
    ("width", 512, "dimensions"),
    ("row_bytes", 1000, "bytes of a row beside the vector: path, captions, frames"),
    ("thumb_bytes", 10_000, "bytes of a picture"),
    ("machine_gb", 256, "GB of memory of a machine that searches"),
    ("core_hour", 0.05, "price of a CPU core for an hour"),
    ("gpu_hour", 3.0, "price of a GPU for an hour"),
    ("memory_month", 4.0, "price of a GB of memory for a month"),
    ("disk_month", 0.1, "price of a GB of disk for a month"),
)


def tell_cost(a: argparse.Namespace) -> None:
    """Print what embedding and searching cost, of whole videos and with moments."""
    embedding = ["videos", "vectors", "decoding, core hours", "encoding, GPU hours", "price", "rows and pictures, GB"]
    searching = ["vectors", *(f"{kind}: GB, machines, a month" for kind in ("float32", "int8", "PQ"))]
    rows, months = [], []
    for count in SIZES:
        for windows in (0, a.windows):
            cores = count * (a.decode_all_s if windows else a.decode_s) / 3600
            gpus, vectors = count * (1 + windows) * a.encode_s / 3600, count * (1 + windows)
            stored = (count * a.row_bytes + vectors * a.thumb_bytes) / 1e9
            rows.append([count, vectors, cores, gpus, cores * a.core_hour + gpus * a.gpu_hour, stored])
            held = [vectors * a.width * size / 1e9 for size in (4, 1, 1 / 8)]
            disk = (held[0] + stored) * a.disk_month
            cells = [f"{_short(gb)}, {-(-gb // a.machine_gb):.0f}, {_short(gb * a.memory_month + disk)}" for gb in held]
            months.append([_short(vectors), *cells])
    for names, table in ((embedding, [[_short(cell) for cell in row] for row in rows]), (searching, months)):
        print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
        print("\n".join(f"| {' | '.join(row)} |" for row in table), end="\n\n")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


if __name__ == "__main__":
    main()
