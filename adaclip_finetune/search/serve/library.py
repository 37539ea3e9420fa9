"""The index that is served, and the one that takes its place when `adaclip index` has run again."""

from __future__ import annotations

import asyncio
import math
import sys
import time
import traceback
from concurrent.futures import Future
from contextlib import suppress

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.serve.media import Media
from adaclip_finetune.search.serve.worker import Busy, NotReady, Worker
from adaclip_finetune.search.stored import version_of

_FRAMES_WAITING = 64  # requests for frames


class Library:
    """Looks at the folder when somebody asks, and reads it anew in a thread of its own when it was written anew."""

    often = 1.0
    """Seconds between two looks."""
    patience = 0.5
    """Seconds that a request waits for a new index; then the old one answers it."""
    again = 10.0
    """Seconds until an index that could not be read is read again."""

    def __init__(self, index: VideoIndex) -> None:
        self.index = index
        self.refused: str | None = None
        """Why nothing can be searched: the new index is another model's."""
        self._frames, self._reader = Worker("frames", _FRAMES_WAITING), Worker("index", 1)
        self._media: Media | None = None
        self._looking: Future[None] | None = None
        self._look_at, self._read_at, self._seen, self._told = 0.0, math.inf, index.version, ""

    def open(self) -> None:
        """Make ready what was loaded."""
        self._media = Media(self.index, self._frames)

    @property
    def working(self) -> bool:
        """Whether a thread is in the middle of something."""
        return self._frames.working or self._reader.working

    @property
    def media(self) -> Media:
        """The index with its files. Raises NotReady before `open`."""
        if self._media is None:
            raise NotReady("the index is still being read")
        return self._media

    async def follow(self) -> None:
        """Look whether there is a new index, if that was not done just now."""
        if self._media is None:
            return
        if time.monotonic() >= self._look_at and (self._looking is None or self._looking.done()):
            self._look_at = time.monotonic() + self.often
            with suppress(Busy):
                self._looking = self._reader.submit(self._look)
        if self._looking is not None and not self._looking.done():
            await asyncio.wait([asyncio.wrap_future(self._looking)], timeout=self.patience)

    def _look(self) -> None:
        """By the thread: nobody else changes what is served."""
        version = version_of(self.index.folder)
        if version == self._seen and time.monotonic() < self._read_at:
            return
        self._seen, self._read_at = version, math.inf
        if version == self.index.version:
            self.refused, self._told = None, ""
            return
        try:
            self._read()
        except Exception as error:  # whatever it is, what was loaded before goes on
            self.refused, self._read_at = None, time.monotonic() + self.again
            if not isinstance(error, UserError):
                traceback.print_exc()
            self._tell(f"{error}\nUntil then the page searches what was loaded before")

    def _read(self) -> None:
        index = VideoIndex.load(self.index.folder)
        if index.about.fingerprint != self.index.about.fingerprint:
            self.refused = (
                f"{index.folder}: was made anew with another model ({index.about.run}). Stop `adaclip serve` in its "
                "terminal (Ctrl-C) and start it again"
            )
            return self._tell(self.refused)
        self._media = Media(index, self._frames)
        self.index, self.refused, self._told = index, None, ""
        print(f"{index.folder}: was made anew; now it holds {len(index):,} videos", flush=True)

    def _tell(self, message: str) -> None:
        if message != self._told:
            print(f"adaclip serve: {message}", file=sys.stderr, flush=True)
        self._told = message
