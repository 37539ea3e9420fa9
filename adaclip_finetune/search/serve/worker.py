"""Work that takes a while, done by one thread in the order in which it came, beside the event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Busy(Exception):
    """As much is waiting already as may wait."""


class NotReady(Exception):
    """What is asked for is not there yet, or not at all; the message says which."""


class Worker:
    """One thread, so that what it uses need not be safe in several. It is a daemon: it does not outlive the server."""

    def __init__(self, name: str, waiting: int) -> None:
        """waiting: how many jobs may wait for the one that is being done."""
        self._jobs: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue(waiting)
        self._working = threading.Event()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    @property
    def working(self) -> bool:
        """Whether it is in the middle of a job."""
        return self._working.is_set()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Raises Busy."""
        future: Future[T] = Future()
        try:
            self._jobs.put_nowait((job, future))
        except queue.Full:
            raise Busy from None
        return future

    async def do(self, job: Callable[[], T]) -> T:
        """What the job gives or raises; a job whose asker has gone before its turn is left out. Raises Busy."""
        return await asyncio.wrap_future(self.submit(job))

    def _work(self) -> None:
        while True:
            job, future = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue
            self._working.set()
            try:
                future.set_result(job())
            except BaseException as error:  # whoever waits is told
                future.set_exception(error)
            self._working.clear()
