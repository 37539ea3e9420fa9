"""An index of small real videos, written by hand, and a model that is none: for the tests of the page's server."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import uvicorn
from media import coded_frame, write_video
from PIL import Image

from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.serve.address import listen
from adaclip_finetune.search.serve.app import create_app
from adaclip_finetune.search.serve.connection import Connection, server_config
from adaclip_finetune.search.serve.engine import Encoder, Engine
from adaclip_finetune.search.serve.guard import Policy
from adaclip_finetune.search.serve.library import Library
from adaclip_finetune.search.serve.picture import MAX_BYTES
from adaclip_finetune.search.stamp import stamp_of
from adaclip_finetune.search.stored import THUMBS, About, write_index

WIDTH = 16


def axis(number: int) -> np.ndarray:
    """(WIDTH,)."""
    return np.eye(WIDTH, dtype=np.float32)[number]


class Axes:
    """A model to which the text "3" is the third axis, and so is a picture with a red of about 30."""

    def encode_text(self, texts: Sequence[str]) -> Any:
        return np.stack([axis(int(text)) for text in texts])

    def encode_image(self, image: Image.Image) -> Any:
        return axis(round(image.convert("RGB").getpixel((0, 0))[0] / 10))


def write_small_index(folder: Path, count: int = 5, thumbs: bool = True) -> VideoIndex:
    """`count` videos of two seconds, number n on axis n; frames 5 and 30 of each are chosen, the second weighs more."""
    index = folder / "my.index"
    (index / THUMBS).mkdir(parents=True)
    rows = []
    for number in range(count):
        path = write_video(folder / "videos" / f"video{number}.mp4", 50)
        if thumbs:
            Image.fromarray(coded_frame(30)).save(index / THUMBS / f"{number}.jpg")
        rows.append(row(path, f"{number}.jpg" if thumbs else ""))
    vectors = np.stack([axis(number) for number in range(count)]) if count else np.empty((0, WIDTH), np.float32)
    write_index(index, about(folder / "videos"), vectors, rows)
    return VideoIndex.load(index)


def about(root: Path) -> About:
    return About("f" * 64, "nowhere", {}, str(root), str(root), "flat", "float32", "2026-01-01", "2026-01-01")


def row(path: Path, thumb: str) -> dict[str, Any]:
    found = stamp_of(path)
    frames = [{"index": 5, "time": 0.2, "weight": 0.25}, {"index": 30, "time": 1.2, "weight": 0.75}]
    return {
        "id": path.name,
        "path": str(path),
        "size": found.size,
        "mtime_ns": found.mtime_ns,
        "duration": 2.0,
        "captions": ["two dogs run"],
        "frames": frames,
        "best": 1,
        "thumb": thumb,
    }


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]  # names in small letters
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """A real server in a thread; `ask` sends exactly what it is told."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(
        self,
        path: str,
        method: str = "GET",
        body: bytes | None = None,
        host: str | None = None,
        origin: str | None = None,
        **headers: str,
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", f"127.0.0.1:{self.port}" if host is None else host)
        if origin is not None:
            connection.putheader("Origin", origin)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        if body is not None and "Content_Length" not in headers:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, content)


@contextmanager
def running(
    index: VideoIndex,
    encoder: Encoder | None = None,
    load: Callable[[], Encoder] | None = None,
    connection: type[Connection] = Connection,
    port: int = 0,
    **policy: Any,
) -> Iterator[Server]:
    """Serves the index, with the model `Axes` or another one ready; or with one that `load` gives some time."""
    listening = listen("127.0.0.1", port)
    port = listening.getsockname()[1]
    engine, library = Engine(load or (lambda: encoder or Axes())), Library(index)
    library.open()
    given = {"host": "127.0.0.1", "port": port, "reachable": False, "token": None, "max_body": MAX_BYTES} | policy
    app = create_app(engine, library, Policy(**given))
    server = uvicorn.Server(server_config(app, connection))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    engine.start()
    try:
        while not server.started or (load is None and engine.state.name == "loading"):
            time.sleep(0.01)
        yield Server(port)
    finally:
        server.should_exit = True
        thread.join()
