"""The model behind the page: loaded beside it, and asked one query at a time."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from PIL import Image

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import Hit, VideoIndex
from adaclip_finetune.search.serve.picture import decode_picture
from adaclip_finetune.search.serve.worker import NotReady, Worker

WAITING = 8  # queries

_WAY_OUT = "Nothing can be searched until `adaclip serve` is started again; Ctrl-C ends this"


class Encoder(Protocol):
    """What is asked of a model (search/retriever.py)."""

    def encode_text(self, texts: Sequence[str]) -> Any:
        """(Q, D)."""
        ...

    def encode_image(self, image: Image.Image) -> Any:
        """(D,)."""
        ...


class State(NamedTuple):
    """How far the model is; `message` says why it failed."""

    name: Literal["loading", "ready", "failed"]
    message: str | None = None


class Engine:
    """Queries (texts, pictures) to hits. The model is loaded by the thread that then asks it."""

    def __init__(self, load: Callable[[], Encoder]) -> None:
        self.state = State("loading")
        self._load = load
        self._encoder: Encoder | None = None
        self._worker = Worker("model", WAITING)

    def start(self) -> None:
        """Begin to load."""
        self._worker.submit(self._start)

    @property
    def working(self) -> bool:
        """Whether the model is being loaded or asked at this moment."""
        return self._worker.working

    async def by_text(self, index: VideoIndex, text: str, k: int) -> list[Hit]:
        """The k nearest videos. Raises NotReady, Busy, UserError."""
        encoder = self._ready()
        return await self._worker.do(lambda: index.search(encoder.encode_text([text]), k)[0])

    async def by_picture(self, index: VideoIndex, content: bytes, k: int) -> list[Hit]:
        """The k nearest videos to a picture as it was sent. Raises BadPicture, NotReady, Busy, UserError."""
        encoder = self._ready()
        return await self._worker.do(lambda: index.search(encoder.encode_image(decode_picture(content))[None], k)[0])

    def _ready(self) -> Encoder:
        if self._encoder is None:
            raise NotReady(self.state.message or "the model is still being loaded")
        return self._encoder

    def _start(self) -> None:
        started = time.monotonic()
        try:
            self._encoder = self._load()
        except UserError as error:
            self.state = State("failed", str(error))
            print(f"adaclip: error: {error}\n{_WAY_OUT}", file=sys.stderr, flush=True)
        except Exception as error:  # whatever it is, the page must not wait for ever
            self.state = State("failed", f"the model could not be loaded ({error!r}); the terminal tells more")
            traceback.print_exc()
            print(_WAY_OUT, file=sys.stderr, flush=True)
        else:
            self.state = State("ready")
            print(f"the model is ready after {time.monotonic() - started:.1f} s", flush=True)
