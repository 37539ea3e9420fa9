"""Ctrl-C and SIGTERM (as schedulers send it) end a run where it can go on from, with everything saved."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tqdm import tqdm

from adaclip_finetune.processes import is_main

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}  # 75 is EX_TEMPFAIL of sysexits.h: "run me again later"

_ONE_SIGNAL = 1.0  # seconds


class Interrupted(KeyboardInterrupt):
    """The run was told to stop. `exit_code` says by which signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = EXIT_CODES[signal.Signals(signum)]


class StopSignals:
    """Within it, Ctrl-C and SIGTERM raise Interrupted where they come; within `deferred` they wait for its end.

    Outside the main thread it does nothing.
    """

    def __init__(self, saving: bool = True) -> None:
        """saving: whether what was learned is saved at the end of `deferred`, for the message."""
        self._then = ", then saving" if saving else ""
        self.received: int | None = None  # a signal that waits
        self._received_at = 0.0
        self._deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in EXIT_CODES:
                # A run that was started in the background (`nohup … &`) ignores Ctrl-C, and goes on doing so.
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While an update or a save must not be torn: a signal is kept in `received`, for the loop to look at, and
        raises at the end. A second Ctrl-C raises at once."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received is not None:
            raise Interrupted(self.received)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if not self._deferred:
            # Python drops what is raised while it ends a generator: then the loop is to see it.
            self.received = signum
            raise Interrupted(signum)
        if self.received is not None:
            # Schedulers and launchers signal twice, at once and each process again; a person takes a while.
            if signum == signal.SIGINT and time.monotonic() - self._received_at > _ONE_SIGNAL:
                raise Interrupted(signum)
            return
        self.received, self._received_at = signum, time.monotonic()
        if is_main():
            name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
            tqdm.write(f"{name}: finishing this update{self._then}; Ctrl-C again to stop at once")
