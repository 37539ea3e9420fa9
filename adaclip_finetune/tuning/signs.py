"""Signs of life: how often a process gives one for the trial it runs, and when their absence means that it died."""

from __future__ import annotations

import time

EVERY_S = 30
# Two machines' clocks may differ, so each process times the silence itself.
SILENCE_S = 180


class Silence:
    """Of trials, as this process has seen them."""

    def __init__(self) -> None:
        self._since: dict[int, tuple[object, float]] = {}

    def too_long(self, trial_id: int, sign: object) -> bool:
        """Whether its last sign of life has been this same one for SILENCE_S."""
        now = time.monotonic()
        if trial_id not in self._since or self._since[trial_id][0] != sign:
            self._since[trial_id] = (sign, now)
        return now - self._since[trial_id][1] > SILENCE_S
