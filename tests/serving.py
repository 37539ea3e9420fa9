"""A small index of real videos, written by hand, a model that is none, and a server in a thread, for tests of serve."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from indexing import index_info
from media import coded_frame, write_video
from PIL import Image

from adaclip_finetune.data.frame_store import stamp_of
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import THUMBS, VideoIndex
from adaclip_finetune.search.serve.app import create_app, make_server
from adaclip_finetune.search.serve.listening import listen
from adaclip_finetune.search.serve.served import ModelThread
from adaclip_finetune.search.stored import EmbeddedMoments, read_index, write_index
from adaclip_finetune.search.transcripts import update_transcripts

WIDTH = 16


def axis(number: int) -> np.ndarray:
    """Return a unit vector (WIDTH,)."""
    return np.eye(WIDTH, dtype=np.float32)[number]


class Axes:
    """A model that maps the text "3" to the third axis, and likewise a picture with a red of about 30.

    It refuses the text "nothing".
    """

    def encode_query(self, texts: Sequence[str]) -> Any:
        if "nothing" in texts:
            raise UserError("nothing: these texts cancel each other out")
        return torch.from_numpy(np.stack([axis(int(text)) for text in texts]))

    def encode_image(self, image: Image.Image) -> Any:
        red = image.convert("RGB").getpixel((0, 0))[0]  # type: ignore[index]
        return torch.from_numpy(axis(round(red / 10)))


_encoded: list[bytes] = []


def write_clip(path: Path) -> Path:
    """Write a video file of two seconds: 50 coded frames, encoded once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _encoded:
        _encoded.append(write_video(path, 50).read_bytes())
    path.write_bytes(_encoded[0])
    return path


def write_small_index(folder: Path, count: int = 5) -> VideoIndex:
    """Write `count` videos of two seconds, number n on axis n, and their index; frames 5 and 30 of each are chosen, of
    which the second weighs more."""
    index = folder / "my.index"
    (index / THUMBS).mkdir(parents=True)
    rows = []
    for number in range(count):
        path = write_clip(folder / "videos" / f"video{number}.mp4")
        Image.fromarray(coded_frame(30)).save(index / THUMBS / f"{number}.jpg")
        rows.append(served_row(path, f"{number}.jpg"))
    vectors = np.stack([axis(number) for number in range(count)]) if count else np.empty((0, WIDTH), np.float32)
    write_index(index, index_info(), vectors, rows)
    return VideoIndex.load(index)


def write_divided_index(folder: Path, count: int = 3) -> VideoIndex:
    """Write `count` videos of two seconds, number n on axis n, and their index with windows of one second and 0.5 s.

    The second of the three windows of video n, from 0.5 s to 1.5 s, lies on axis n + 5, the others on axis 15.
    """
    whole = write_small_index(folder, count)
    rows = [video.row for video in read_index(whole.folder).videos()]
    parts = [{"start": n / 2, "end": n / 2 + 1, "time": n / 2 + 0.6, "thumb": f"at{n}.jpg"} for n in range(3)]
    for n in range(3):
        Image.fromarray(coded_frame(25 + n)).save(whole.folder / THUMBS / f"at{n}.jpg")
    moments = [EmbeddedMoments(parts, np.stack([axis(15), axis(n + 5), axis(15)])) for n in range(count)]
    info = index_info(moments={"by": "windows", "window": 1.0, "stride": 0.5})
    write_index(whole.folder, info, np.stack([axis(n) for n in range(count)]), rows, moments)
    return VideoIndex.load(whole.folder)


def add_transcripts(index: VideoIndex, **lines: str) -> None:
    """Give videos of an index a transcript with one line, from 0.6 s to 1.8 s: name of the video → text."""
    folder = index.folder.parent
    files = {f"{name}.mp4": [folder / f"{name}.srt"] for name in lines}
    for name, text in lines.items():
        (folder / f"{name}.srt").write_text(f"1\n00:00:00,600 --> 00:00:01,800\n{text}\n")
    update_transcripts(index.folder, files, files)


def write_one(folder: Path, path: Path, thumb: str = "", **info: Any) -> VideoIndex:
    """Write the index of one file or folder of frames, which is number 0."""
    index = folder / "one.index"
    index.mkdir(exist_ok=True)
    write_index(index, index_info(**info), axis(0)[None], [served_row(path, thumb)])
    return VideoIndex.load(index)


def served_row(path: Path, thumb: str) -> dict[str, Any]:
    """Return the row of a file or a folder of frames."""
    stamp = stamp_of(path)
    frames = [{"index": 5, "time": 0.2, "weight": 0.25}, {"index": 30, "time": 1.2, "weight": 0.75}]
    facts = {"id": path.name, "path": str(path), "size": stamp.size, "mtime_ns": stamp.mtime_ns, "duration": 2.0}
    return facts | {"captions": ["two dogs run"], "frames": frames, "best": 1, "thumb": thumb}


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """A running server; `ask` sends exactly what it is given."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, host: str | None = None, **headers: str
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", f"127.0.0.1:{self.port}" if host is None else host)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, content)

    def found(self, query: str = "q=0") -> list[Any]:
        """Return the videos that a search finds."""
        found: list[Any] = self.ask(f"/api/search?{query}").json["found"]
        return found


@contextmanager
def running(
    index: VideoIndex,
    load: Callable[[], Axes] | None = None,
    port: int = 0,
    token: str | None = None,
) -> Iterator[Server]:
    """Serve an index, with the model `Axes` ready, or with one that `load` returns when it likes."""
    model = ModelThread(load or Axes)  # type: ignore[arg-type]
    listening = listen("127.0.0.1", port)
    server = make_server(create_app(model, index, token))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    model.start()
    try:
        until(lambda: server.started and (load is not None or model.state != "loading"))
        yield Server(listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


def until(holds: Callable[[], Any], patience: float = 30) -> Any:
    """Return what `holds` returns as soon as that is true; fail after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (found := holds()):
        assert time.monotonic() < deadline, holds
        time.sleep(0.01)
    return found
