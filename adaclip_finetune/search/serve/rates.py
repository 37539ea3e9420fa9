"""How often one address may ask: a bucket of tokens each, which fills steadily up to a limit."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

_ADDRESSES = 1024  # remembered; who has not asked for longest is forgotten


class Rate:
    """`burst` requests at once, `per_second` in the long run, for each address."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_second, self.burst = per_second, burst
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when they were counted

    def allows(self, address: str) -> bool:
        """Whether this request may pass; if so it counts."""
        now = self._clock()
        tokens, counted = self._buckets.pop(address, (float(self.burst), now))
        tokens = min(tokens + (now - counted) * self.per_second, self.burst)
        passes = tokens >= 1
        self._buckets[address] = (tokens - passes, now)
        if len(self._buckets) > _ADDRESSES:
            self._buckets.popitem(last=False)
        return passes
