"""Row `search`: finding the nearest of many videos, opening their index, and serving it."""

from __future__ import annotations

import http.client
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaclip_finetune.bench.measure import Aim, Measured, Setup, check, in_turns
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.serve.app import create_app, make_server
from adaclip_finetune.search.serve.listening import listen
from adaclip_finetune.search.serve.served import ModelThread
from adaclip_finetune.search.stored import FILE, IndexInfo, write_index
from adaclip_finetune.training.device import keep_freed_memory

_WIDTH, _FOUND, _QUERIES = 512, 10, 200
_CLIENTS, _REQUESTS = 16, 160


def search(setup: Setup) -> Iterator[Measured]:
    """Compare `VideoIndex.search` of one query, and of 200 at once, with a plain product, and a sum of all vectors.

    A search has to read the whole matrix once, as its sum does. Times of 200 at once are those of one of them, and so
    are those of the requests that `adaclip serve` gets from 16 clients; its model is a stand-in that takes no time.
    """
    keep_freed_memory()
    for count in (50,) if setup.quick else (1_000, 10_000, 100_000):
        vectors, queries = random_vectors(count)
        with TemporaryDirectory() as name:
            folder = Path(name)
            write_random_index(folder, vectors)
            index, matrix, asked = VideoIndex.load(folder), torch.from_numpy(vectors), torch.from_numpy(queries)
            found = [[hit.video.id for hit in hits] for hits in index.search(queries, _FOUND)]
            expected = _nearest(matrix, asked).tolist()
            same = np.mean([len(set(own) & {f"v{n}" for n in row}) for own, row in zip(found, expected, strict=True)])
            check("the videos found", torch.tensor(same), torch.tensor(float(min(_FOUND, count))), 0.01)
            one = in_turns(
                setup,
                {
                    "sum": matrix.sum,
                    "plain": partial(_nearest, matrix, asked[:1]),
                    "ours": partial(index.search, queries[:1], _FOUND),
                },
                calls=1 if setup.quick else 5,
            )
            one["1.2 x sum + 0.2 ms"] = [1.2 * seconds + 2e-4 for seconds in one["sum"]]
            many = in_turns(
                setup,
                {
                    "sum": matrix.sum,
                    "plain": partial(_nearest, matrix, asked),
                    "ours": partial(index.search, queries, _FOUND),
                },
            )
            for way in ("plain", "ours"):
                many[way] = [seconds / len(queries) for seconds in many[way]]
            opening = in_turns(
                setup, {"reading the file": (folder / FILE).read_bytes, "ours": partial(VideoIndex.load, folder)}
            )
            with _served(index, queries) as ask:
                requests = in_turns(setup, {"ours": ask})
            requests = {"10 ms": [0.01] * setup.turns, "ours": [seconds / _REQUESTS for seconds in requests["ours"]]}
        yield Measured(
            f"one query, {count:,} videos", one, [Aim("ours", "1.2 x sum + 0.2 ms", 1), Aim("ours", "plain")]
        )
        yield Measured(f"{len(queries)} at once, {count:,} videos", many, [Aim("ours", "sum", 5), Aim("ours", "plain")])
        yield Measured(f"opening {count:,} videos", opening, [Aim("ours", "reading the file")])
        yield Measured(f"requests, {_CLIENTS} clients, {count:,} videos", requests, [Aim("ours", "10 ms", 1)])


@contextmanager
def _served(index: VideoIndex, queries: NDArray[np.float32]) -> Iterator[Callable[[], None]]:
    """Serve an index, and give a function that lets several clients ask for the queries in turn."""

    class Model:
        def encode_query(self, texts: list[str]) -> Tensor:
            return torch.from_numpy(queries[int(texts[0]) % len(queries)][None])

    model = ModelThread(Model)  # type: ignore[arg-type]
    server, listening = make_server(create_app(model, index)), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listening],))
    port = listening.getsockname()[1]

    def client(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for number in range(first, _REQUESTS, _CLIENTS):
            connection.request("GET", f"/api/search?q={number}")
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise UserError(f"bench: `adaclip serve` answered {answer.status} {answer.reason}")
        connection.close()

    def ask() -> None:
        with ThreadPoolExecutor(_CLIENTS) as clients:
            list(clients.map(client, range(_CLIENTS)))

    with redirect_stdout(io.StringIO()):  # it says when it is ready
        model.start()
        while model.state == "loading":
            time.sleep(0.01)
    thread.start()
    try:
        yield ask
    finally:
        server.should_exit = True
        thread.join()
        model.stop()  # PyTorch's threads of this one would slow down what is measured next
        listening.close()


def random_vectors(count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return random vectors (V, D) of length 1, and queries (Q, D) that are near some of them."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((count, _WIDTH), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    near = vectors[:: max(1, count // _QUERIES)][:_QUERIES]
    return vectors, near + 0.02 * random.standard_normal(_WIDTH, np.float32)


def write_random_index(folder: Path, vectors: NDArray[np.float32]) -> None:
    """Write an index of videos with these vectors (V, D), called v0, v1, …."""
    write_index(folder, IndexInfo("f", "/run", {}, "/videos"), vectors, [_row(n) for n in range(len(vectors))])


def _nearest(vectors: Tensor, queries: Tensor) -> Tensor:
    """Return the numbers of the nearest vectors (V, D) to each query (Q, D), best first: (Q, 10)."""
    return (queries @ vectors.T).topk(min(_FOUND, len(vectors))).indices


def _row(number: int) -> dict[str, Any]:
    frames = [{"index": 8 * n, "time": n / 3, "weight": 1 / 12} for n in range(12)]
    video = {"path": "/videos/v.mp4", "size": 1, "mtime_ns": 1, "duration": 4.0, "captions": ["two dogs run"] * 5}
    return video | {"id": f"v{number}", "frames": frames, "best": 0, "thumb": "v.jpg"}
