"""95 % intervals of figures, and tests of whether two models differ: what would change with other videos of the kind.

Captions of one video are answered well or badly together. The bootstrap (Efron 1979) therefore draws videos with
replacement, each with all its captions (the cluster bootstrap of Davison and Hinkley 1997, 3.8), and takes the 2.5 and
97.5 percentiles of the figures. Two models are compared query by query with a permutation test: if they do not differ,
a video that one of them wins could just as well have been lost. The p-value is the share of all exchanges of signs,
video by video, that give a difference at least as large. It is exact; with one caption a video it is McNemar's (1947).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy  # imports its parts when they are first used
from numpy.typing import NDArray

from adaclip_finetune.evaluation.metrics import IntArray

RESAMPLES = 10_000
RECALLS = (1, 5, 10)
_AT_ONCE = 200_000  # numbers in a block of draws, which fits the cache of a processor

Floats = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """R@k of one model minus that of another one on the same queries, in points, with its 95 % interval.

    `p` is the two-sided p-value of no difference. `won` and `lost` count the queries that only one of them answers.
    """

    points: float
    interval: Interval
    p: float
    won: int
    lost: int


def intervals(ranks: IntArray, videos: IntArray | None = None, seed: int = 0) -> dict[str, Interval]:
    """Return 95 % intervals of R@1, R@5, R@10 (percent), MedR and MeanR for queries with these ranks (Q,), from 1.

    Queries with the same number in `videos` (Q,) share a video; by default each has its own. A recall of 0 or 100 is
    the same in every draw, so it gets the exact interval of Clopper and Pearson (1934), with one trial for each video.
    """
    of_query, count = _clusters(ranks, videos)
    values, places = np.unique(ranks, return_inverse=True)
    # How often each rank (U, ascending) occurs among the queries of each video (V).
    table = scipy.sparse.csr_array((np.ones_like(of_query), (of_query, places.reshape(-1))), (count, len(values)))
    # Videos of one kind have the same ranks: a sum with one 62-bit number per rank tells the kinds apart.
    sums = table @ np.random.default_rng(seed).integers(2**62, size=len(values))
    _, first, kind_of_video = np.unique(sums, return_index=True, return_inverse=True)
    parts = [_figures(values, drawn @ table[first]) for drawn in _draws(kind_of_video.reshape(-1), seed)]
    found = {name: _percentiles(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    for k in RECALLS:
        if (hits := ranks <= k).all() or not hits.any():
            found[f"R@{k}"] = _exact(bool(hits.all()), count)
    return found


def paired_difference(
    ranks: IntArray, other: IntArray, videos: IntArray | None = None, k: int = 1, seed: int = 0
) -> Difference:
    """Return R@k of `ranks` minus R@k of `other` (both (Q,), of the same queries); `videos` is as in `intervals`."""
    if ranks.shape != other.shape:
        raise ValueError(f"ranks of the same queries are needed, not of {len(ranks)} and {len(other)}")
    of_query, count = _clusters(ranks, videos)
    signs = (ranks <= k).astype(np.int64) - (other <= k)
    of_each = np.stack([np.bincount(of_query, signs, count), np.bincount(of_query, minlength=count)], axis=1)
    # Videos of one kind have the same number of queries, and the same number of them won.
    kinds, size_of_kind = np.unique(of_each.astype(np.int64), axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(count, size_of_kind / count, RESAMPLES) @ kinds
    points = 100 * drawn[:, 0] / drawn[:, 1]
    won, lost = int((signs > 0).sum()), int((signs < 0).sum())
    p = _share_of_signs(of_each[:, 0].astype(np.int64))
    return Difference(100 * (won - lost) / len(ranks), _percentiles(points), p, won, lost)


def recall_over_seeds(ranks: IntArray, videos: IntArray, k: int = 1, seed: int = 0) -> tuple[float, Interval]:
    """Return the mean R@k of a method over its runs, in percent, and the 95 % interval over videos and runs.

    `ranks` (S, Q) are those of S runs with different seeds on the same queries, and `videos` (Q,) is as in `intervals`.
    A draw takes as many runs, and as many videos with all their captions, as there are, both with replacement (the
    pigeonhole bootstrap of Owen 2007). With one run it holds for that run only, and few runs show too little of how
    much runs differ. A recall of 0 or 100 in all runs gets the exact interval of so many videos.
    """
    hits = ranks <= k
    mean, interval = _over_seeds(hits.astype(np.int64), videos, seed)
    if hits.all() or not hits.any():
        interval = _exact(bool(hits.all()), len(np.unique(videos)))
    return mean, interval


def difference_over_seeds(
    ranks: IntArray, other: IntArray, videos: IntArray, k: int = 1, seed: int = 0
) -> tuple[float, Interval]:
    """Return the mean R@k of the runs of a method minus that of another one, in points, with its 95 % interval.

    `ranks` (S, Q) and `other` (S, Q), or (1, Q) for a baseline without seeds, are of the same queries, and runs in the
    same row have the same seed; a draw takes both runs of a seed. The rest is as in `recall_over_seeds`.
    """
    return _over_seeds((ranks <= k).astype(np.int64) - (other <= k), videos, seed)


def _over_seeds(values: IntArray, videos: IntArray, seed: int) -> tuple[float, Interval]:
    """Return the mean of `values` (S, Q) in percent, and its 95 % interval over runs (S) and videos."""
    of_query, count = _clusters(values[0], videos)
    runs = len(values)
    of_video = np.stack([np.bincount(of_query, row, count) for row in values], axis=1)  # (V, S)
    sizes = np.bincount(of_query, minlength=count).astype(np.float64)
    random, points = np.random.default_rng([seed, runs]), []
    for drawn in _draws(np.arange(count), seed):
        times = drawn.astype(np.float64)  # a product of integers would not use BLAS
        weights = random.multinomial(runs, np.full(runs, 1 / runs), len(drawn)) / runs
        points.append(100 * ((times @ of_video) * weights).sum(axis=1) / (times @ sizes))
    return 100 * float(values.mean()), _percentiles(np.concatenate(points))


def _exact(is_100: bool, videos: int) -> Interval:
    """Return the interval of Clopper and Pearson for a recall of 100, or else of 0, with one trial for each video."""
    exact = scipy.stats.binomtest(videos if is_100 else 0, videos).proportion_ci(0.95, method="exact")
    return 100 * float(exact.low), 100 * float(exact.high)


def _clusters(ranks: IntArray, videos: IntArray | None) -> tuple[IntArray, int]:
    """Return the video of each query (Q,), numbered from 0, and the number of videos."""
    if not len(ranks):
        raise ValueError("there are no queries")
    if videos is None:
        return np.arange(len(ranks)), len(ranks)
    if videos.shape != ranks.shape:
        raise ValueError(f"{len(ranks)} queries have {len(ranks)} videos, not {len(videos)}")
    different, numbers = np.unique(videos, return_inverse=True)
    return numbers.reshape(-1), len(different)


def _draws(kind_of_video: IntArray, seed: int) -> Iterator[IntArray]:
    """Yield how often each kind of video (K) was drawn, in blocks (b, K) of RESAMPLES draws altogether.

    A draw takes as many videos as there are (V). It costs one binomial variable per kind, which takes six times as long
    as drawing one video, so where there are many kinds, the videos are drawn one by one. The distribution is the same.
    """
    random, size_of_kind = np.random.default_rng(seed), np.bincount(kind_of_video)
    videos, kinds = len(kind_of_video), len(size_of_kind)
    few = 6 * kinds < videos
    at_once = max(1, _AT_ONCE // (kinds if few else videos))
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        if few:
            yield random.multinomial(videos, size_of_kind / videos, size)
        else:
            drawn = kind_of_video[random.integers(videos, size=(size, videos))] + kinds * np.arange(size)[:, None]
            yield np.bincount(drawn.reshape(-1), minlength=size * kinds).reshape(size, kinds)


def _figures(values: IntArray, counts: IntArray) -> dict[str, Floats]:
    """Return the figures (b,) of draws in which the ranks `values` (U,) occur `counts` (b, U) times."""
    reached = counts.cumsum(axis=1)
    total = reached[:, -1]
    # The median of an even number of ranks is the mean of the two in the middle.
    middle = [values[(reached > place[:, None]).argmax(axis=1)] for place in ((total - 1) // 2, total // 2)]
    recalls = {f"R@{k}": 100 * counts[:, values <= k].sum(axis=1) / total for k in RECALLS}
    return {**recalls, "MedR": (middle[0] + middle[1]) / 2, "MeanR": counts @ values / total}


def _share_of_signs(differences: IntArray) -> float:
    """Return the share of all sign vectors s (V,) for which |s · differences| is at least |sum of differences|.

    Shifted and halved, s · differences is a sum of binomial variables, one for each size of a difference, so that its
    distribution is computed exactly.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    chances = np.ones(1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        wider = np.zeros(len(chances) + size * count)
        for number, chance in enumerate(scipy.stats.binom.pmf(np.arange(count + 1), count, 0.5)):
            wider[number * size : number * size + len(chances)] += chance * chances
        chances = wider
    sums = 2 * np.arange(len(chances)) - (len(chances) - 1)
    return min(1.0, float(chances[np.abs(sums) >= abs(int(differences.sum()))].sum()))


def _percentiles(values: Floats) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
