"""Stop a run on Ctrl-C or SIGTERM where it can continue later, with everything saved."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from tqdm import tqdm

from adaclip_finetune.processes import is_main

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}  # 75 is EX_TEMPFAIL of sysexits.h: "try again later"

# Schedulers and launchers send a signal several times at once; a person takes longer than this to repeat it.
_ONE_SIGNAL = 1.0  # seconds


class Interrupted(KeyboardInterrupt):
    """The run was told to stop by a signal, which decides `exit_code`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = EXIT_CODES[signal.Signals(signum)]


class StopSignals:
    """A context in which Ctrl-C and SIGTERM raise Interrupted at once, or within `deferred` at the end of that block.

    It does nothing outside the main thread. `received` is the signal that waits, for a loop to look at. Set `saving` to
    False if nothing is saved at the end of `deferred`; the message then does not promise it.
    """

    def __init__(self, saving: bool = True) -> None:
        self._then = ", then saving" if saving else ""
        self.received: int | None = None
        self._received_at = 0.0
        self._is_deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in EXIT_CODES:
                # A run in the background (`nohup … &`) ignores Ctrl-C and must go on ignoring it.
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold signals back until the end of the block. A second Ctrl-C, later than a second, raises at once."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.received is not None:
            raise Interrupted(self.received)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        first, self.received = self.received is None, self.received or signum
        if not self._is_deferred:  # Python drops what is raised while a generator ends; the loop looks at `received`.
            raise Interrupted(signum)
        if first:
            self._received_at = time.monotonic()
            if is_main():
                with suppress(OSError, ValueError, AttributeError):  # a terminal that is gone, or never was there
                    tqdm.write(f"finishing this update{self._then}; press Ctrl-C again to stop at once")
        elif signum == signal.SIGINT and time.monotonic() - self._received_at > _ONE_SIGNAL:
            raise Interrupted(signum)
