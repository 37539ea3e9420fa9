"""How far a run is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

EVERY = 10.0  # seconds between plain lines


class Progress:
    """Videos done, frames a second, the time that is left, failures. Use as a context."""

    def __init__(self, videos: int) -> None:
        self._videos, self._done, self._frames, self._failed = videos, 0, 0, 0
        self._start = self._said = time.monotonic()
        self._bar = tqdm(total=videos, desc="extracting", unit="video", leave=False) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, frames: int, failed: bool) -> None:
        """One more video is done."""
        self._done, self._frames, self._failed = self._done + 1, self._frames + frames, self._failed + failed
        now = time.monotonic()
        rate = self._frames / max(now - self._start, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate:.0f} frames/s, {self._failed} failed", refresh=False)
            self._bar.update()
        elif now - self._said >= EVERY and self._done < self._videos:
            self._said = now
            left = (now - self._start) / self._done * (self._videos - self._done)
            print(
                f"{self._done} of {self._videos} videos, {rate:.0f} frames/s, about {left / 60:.1f} min left, "
                f"{self._failed} failed",
                flush=True,
            )
