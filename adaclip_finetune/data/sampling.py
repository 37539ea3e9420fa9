"""Which frames of a video are read, and where all randomness of the data comes from.

Pure functions. A draw depends on (what it is for, seed, epoch, index) alone: never on the worker that makes it, on the
order of the batches or on how many processes share them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STREAMS = {"caption": 0, "frames": 1, "shuffle": 2, "selection": 3, "dropout": 4}


def generator(stream: str, seed: int, epoch: int, index: int = 0) -> np.random.Generator:
    """The generator of one decision. Streams keep the frames of entry 3 independent of its caption."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((STREAMS[stream], seed, epoch, index))))


def frame_indices(
    num_frames: int,
    num_frm: int,
    *,
    segment: bool = False,
    subset: int = 0,
    random: np.random.Generator | None = None,
) -> NDArray[np.int64]:
    """The indices (from 0, ascending) of the frames to read from a video of `num_frames`.

    segment: the middle of each of num_frm equal segments; else num_frm frames evenly from the first, or, with a
    generator, drawn at random. subset > 0 keeps that many of the num_frm, evenly or, with a generator, at random.
    A video shorter than num_frm repeats frames. Length: num_frm, or min(subset, num_frm).
    """
    if segment:
        edges = np.linspace(0, num_frames, num_frm + 1).astype(np.int64)
        indices = (edges[:-1] + edges[1:]) // 2
    elif random is None:
        indices = _evenly(num_frames, num_frm)
    else:
        indices = _drawn(num_frames, num_frm, random)
    if not 0 < subset < num_frm:
        return indices
    return indices[_evenly(num_frm, subset) if random is None else _drawn(num_frm, subset, random)]


def _evenly(population: int, wanted: int) -> NDArray[np.int64]:
    return np.linspace(0, population, wanted, endpoint=False).astype(np.int64)


def _drawn(population: int, wanted: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Without replacement as far as the population goes: each is taken wanted // population times, the rest drawn."""
    rounds, rest = divmod(wanted, population)
    drawn = [np.arange(population)] * rounds + [random.choice(population, rest, replace=False)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)
