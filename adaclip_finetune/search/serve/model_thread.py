"""The model behind the page: one thread loads it, while the page is already served, and then computes with it."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, TypeVar

from fastapi import HTTPException

from adaclip_finetune.errors import UserError

if TYPE_CHECKING:
    from adaclip_finetune.search.search_model import SearchModel

T = TypeVar("T")


class ModelThread:
    """Loads a model and calls functions with it, one at a time. `message` says why loading failed."""

    def __init__(self, load: Callable[[], SearchModel]) -> None:
        self.state: Literal["loading", "ready", "failed"] = "loading"
        self.message: str | None = None
        self._load = load
        self._model: SearchModel | None = None
        self._thread = ThreadPoolExecutor(1, "model")

    def start(self) -> None:
        """Begin to load the model."""
        self._thread.submit(self._start)

    async def run(self, function: Callable[[SearchModel], T]) -> T:
        """Return what the function returns for the model. Raise HTTPException (503) while there is none."""
        if self._model is None:
            raise HTTPException(503, self.message or "the model is still being loaded", {"retry-after": "2"})
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, self._model)

    def _start(self) -> None:
        started = time.monotonic()
        try:
            self._model = self._load()
            self.state = "ready"
            print(f"the model is ready after {time.monotonic() - started:.1f} s", flush=True)
        except Exception as error:  # whatever it is, the page must not wait for ever
            if not isinstance(error, UserError):
                traceback.print_exc()
            self.message, self.state = str(error) or repr(error), "failed"
            stopped = "Nothing can be searched until `adaclip serve` is started again; Ctrl-C stops it"
            print(f"adaclip: error: {self.message}\n{stopped}", file=sys.stderr, flush=True)
