"""How far figures would move with other queries of the same kind: 95 % intervals, and whether two models differ.

Queries are drawn again with replacement (Efron 1979), and the 2.5 and 97.5 percentiles of the figures taken. What a
draw of queries leaves is how often each distinct rank, or each outcome of a pair, was drawn: that is multinomial, and
drawn at once. Two models are compared query by query: if they do not differ, each query that one of them alone answers
might as well be the other's. The p-value is the share of all such exchanges of signs that would give a difference as
large; for recalls this permutation test is McNemar's (1947), and exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from adaclip_finetune.evaluation.metrics import IntArray

RESAMPLES = 10_000
RECALLS = (1, 5, 10)
_AT_ONCE = 4_000_000  # counts that are held, 32 MB

Floats = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """R@k of a model minus that of another on the same queries, in points: `interval` is its 95 % interval, `p` the
    two-sided p-value of no difference. `won` and `lost` queries are answered by one of them alone."""

    points: float
    interval: Interval
    p: float
    won: int
    lost: int

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def intervals(ranks: IntArray, seed: int = 0) -> dict[str, Interval]:
    """95 % intervals of R@1, R@5, R@10 (percent), MedR and MeanR over the queries with these ranks (Q,), from 1."""
    found = [_figures(values, counts) for values, counts in _resampled(ranks, seed)]
    return {name: _percentiles(np.concatenate([part[name] for part in found])) for name in found[0]}


def paired_difference(ranks: IntArray, other: IntArray, k: int = 1, seed: int = 0) -> Difference:
    """R@k of `ranks` minus R@k of `other`, query i being the same in both (Q,)."""
    if ranks.shape != other.shape or not len(ranks):
        raise ValueError(f"ranks of the same queries are needed, not of {len(ranks)} and {len(other)}")
    hits, others = ranks <= k, other <= k
    won, lost = int((hits & ~others).sum()), int((~hits & others).sum())
    shares = np.array([won, lost, len(ranks) - won - lost]) / len(ranks)
    drawn = np.random.default_rng(seed).multinomial(len(ranks), shares, size=RESAMPLES)
    points = 100 * (drawn[:, 0] - drawn[:, 1]) / len(ranks)
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return Difference(100 * (won - lost) / len(ranks), _percentiles(points), p, won, lost)


def _resampled(ranks: IntArray, seed: int) -> Iterator[tuple[IntArray, IntArray]]:
    """The distinct ranks (U,), ascending, and how often each was drawn (b, U), RESAMPLES rows in all."""
    if not len(ranks):
        raise ValueError("there are no queries")
    values, counts = np.unique(ranks, return_counts=True)
    random, rows = np.random.default_rng(seed), max(1, _AT_ONCE // len(values))
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        yield values, random.multinomial(len(ranks), counts / len(ranks), size=size)


def _figures(values: IntArray, counts: IntArray) -> dict[str, Floats]:
    """The figures (b,) of each draw."""
    total = int(counts[0].sum())
    reached = counts.cumsum(axis=1)
    # The median of an even number of ranks is the mean of the two in the middle.
    middle = [values[(reached > place).argmax(axis=1)] for place in ((total - 1) // 2, total // 2)]
    recalls = {f"R@{k}": 100 * counts[:, values <= k].sum(axis=1) / total for k in RECALLS}
    return {**recalls, "MedR": (middle[0] + middle[1]) / 2, "MeanR": counts @ values / total}


def _percentiles(values: Floats) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
