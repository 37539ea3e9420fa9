"""Which frames of a video are read, and where all randomness of the data comes from.

Pure functions. A draw depends on (what it is for, seed, epoch, index) alone: never on the worker that makes it, on the
order of the batches or on how many processes share them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STREAMS = {
    "caption": 0,
    "frames": 1,
    "shuffle": 2,
    "selection": 3,
    "dropout": 4,
    "lisa": 5,
    "second": 6,
    "auxiliary": 7,
    "template": 8,
    "view": 9,
    "text noise": 10,
}


def generator(stream: str, seed: int, epoch: int, index: int = 0) -> np.random.Generator:
    """Return the generator for one decision. Streams keep the frames of an entry independent of its caption."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((STREAMS[stream], seed, epoch, index))))


class Shuffle:
    """A random order of `size` things that takes no memory: calling it with places returns what is at them.

    It is a Feistel network (Luby & Rackoff 1988), which permutes the numbers of an even number of bits; what falls
    outside of `size` is permuted again until it falls inside (cycle walking, Black & Rogaway 2002).
    """

    def __init__(self, size: int, random: np.random.Generator) -> None:
        self._size = np.uint64(size)
        half = max(1, -(-(size - 1).bit_length() // 2))
        self._half, self._mask = np.uint64(half), np.uint64(2**half - 1)
        self._keys = random.integers(2**64, size=6, dtype=np.uint64)

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers, from 0 to size - 1, at these places."""
        numbers = self._permuted(places.astype(np.uint64))
        while (outside := numbers >= self._size).any():
            numbers[outside] = self._permuted(numbers[outside])
        return numbers.astype(np.int64)

    def _permuted(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & self._mask)
        return left << self._half | right


def frame_indices(
    num_frames: int,
    num_frm: int,
    *,
    segment: bool = False,
    to_last: bool = False,
    subset: int = 0,
    random: np.random.Generator | None = None,
    draw: str = "random",
    times: NDArray[np.float64] | None = None,
) -> NDArray[np.int64]:
    """Return the indices (from 0, ascending) of the frames to read from a video of `num_frames`.

    segment: take the middle of each of num_frm equal segments. to_last: take num_frm frames evenly from the first to
    the last. Otherwise take them evenly from the first on. With a generator, `draw` says what is drawn: num_frm frames
    (`random`, without effect if segment), one in each segment (`segments`), or the first and the last of evenly spaced
    ones (`ends`, each at most the distance of two frames from the ends of the video). subset > 0 keeps that many of the
    frames, evenly or at random. times: when each frame is shown, in seconds, ascending. Where the rate is not constant,
    frames are chosen evenly in time, at random with probabilities proportional to how long they are shown, and a frame
    that is shown long may be chosen several times. A video shorter than num_frm repeats frames. Length: num_frm, or
    min(subset, num_frm).
    """
    if times is not None and is_constant_rate(times):
        times = None
    if random is not None and draw == "segments":
        indices = _at((np.arange(num_frm) + random.random(num_frm)) / num_frm * num_frames, times)
    elif random is not None and draw == "ends":
        interval = min(num_frames // max(num_frm - 1, 1), num_frames - 1)
        start, end = random.integers(interval + 1), num_frames - 1 - random.integers(interval + 1)
        indices = _at(np.linspace(start, max(start, end), num_frm), times)
    elif to_last and random is None:
        indices = _at(np.linspace(0, num_frames - 1, num_frm), times)
    elif segment:
        edges = np.linspace(0, num_frames, num_frm + 1).astype(np.int64)
        middles = (np.arange(num_frm) + 0.5) / num_frm
        indices = (edges[:-1] + edges[1:]) // 2 if times is None else _shown_at(middles, times)
    elif random is not None:
        indices = _drawn(num_frames, num_frm, random, None if times is None else _durations(times))
    else:
        indices = _evenly(num_frames, num_frm) if times is None else _shown_at(np.arange(num_frm) / num_frm, times)
    if not 0 < subset < num_frm:
        return indices
    return indices[_evenly(num_frm, subset) if random is None else _drawn(num_frm, subset, random)]


def is_constant_rate(times: NDArray[np.float64]) -> bool:
    """Return whether each frame is within half a frame of where it would be at a constant rate.

    Containers round times to their own units, so a constant rate is never exact.
    """
    even = np.linspace(times[0], times[-1], len(times))
    return bool((np.abs(times - even) <= (times[-1] - times[0]) / max(len(times) - 1, 1) / 2).all())


def _at(places: NDArray[np.float64], times: NDArray[np.float64] | None) -> NDArray[np.int64]:
    """Return the frames at these places among the frames, numbers from 0 on; at these shares of the time if given."""
    whole = places.astype(np.int64)
    return whole if times is None else _shown_at((whole + 0.5) / len(times), times)


def _shown_at(shares: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the frames that are shown after these shares of the video's length."""
    instants = times[0] + shares * _durations(times).sum() + 1e-5  # times are rounded, here and there differently
    indices: NDArray[np.int64] = np.searchsorted(times, instants, side="right") - 1
    return indices


def _durations(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how long each frame is shown, in seconds: the last one as long as the others on average."""
    durations = np.diff(times)
    return np.append(durations, durations.mean())


def _evenly(population: int, wanted: int) -> NDArray[np.int64]:
    return np.linspace(0, population, wanted, endpoint=False).astype(np.int64)


def _drawn(
    population: int, wanted: int, random: np.random.Generator, weights: NDArray[np.float64] | None = None
) -> NDArray[np.int64]:
    """Draw without replacement as far as possible: each is taken wanted // population times, the rest are drawn."""
    rounds, rest = divmod(wanted, population)
    p = None if weights is None else weights / weights.sum()
    drawn = [np.arange(population)] * rounds + [random.choice(population, rest, replace=False, p=p)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)
