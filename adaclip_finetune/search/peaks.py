"""From the scores of a video's windows to the moments that a query means.

A point in time scores halfway between the mean and the worst of the windows around it: a window that reaches beyond an
event scores less than one inside. A moment is where this curve is above the middle between its mean and its peak. That
finds borders more finely than windows are wide (`scripts/bench/moments.py`), and merges windows that are neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Peak(NamedTuple):
    """A moment: from `start` to `end`, in seconds. `score` is that of its best window.

    `best` is the number of this window; `shown` that of the best window whose own best frame lies inside the moment.
    """

    start: float
    end: float
    score: float
    best: int
    shown: int


def find_peaks(spans: Floats, times: Floats, scores: Floats) -> list[Peak]:
    """Return the moments of a video, best first; they do not overlap.

    `spans` (M, 2) are starts and ends of the windows, without gaps between them, `times` (M,) those of their best
    frames, and `scores` (M,) their cosines with the query. A window that overlaps a better moment, or its best window,
    belongs to it; a window that scores less than the video on average is none.
    """
    edges = np.unique(spans)
    first, last = np.searchsorted(edges, spans[:, 0]), np.searchsorted(edges, spans[:, 1])
    worst, total, around = np.full(len(edges) - 1, np.inf), np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
    for start, end, score in zip(first, last, scores, strict=True):
        np.minimum(worst[start:end], score, out=worst[start:end])
        total[start:end] += score
        around[start:end] += 1
    curve = (worst + total / around) / 2
    mean, free, peaks = np.average(curve, weights=np.diff(edges)), np.ones(len(curve), bool), []
    for window in np.argsort(-scores, kind="stable").tolist():
        if scores[window] < mean - 1e-6:
            break
        if not free[first[window] : last[window]].all():
            continue
        left = first[window] + int(curve[first[window] : last[window]].argmax())
        floor, right = (mean + curve[left]) / 2, left + 1
        while left > 0 and free[left - 1] and curve[left - 1] >= floor:
            left -= 1
        while right < len(curve) and free[right] and curve[right] >= floor:
            right += 1
        free[min(left, first[window]) : max(right, last[window])] = False
        start, end = float(edges[left]), float(edges[right])
        inside = np.flatnonzero((times >= start) & (times < end) & (spans[:, 0] < end) & (spans[:, 1] > start))
        shown = int(inside[scores[inside].argmax()]) if len(inside) else window
        peaks.append(Peak(start, end, float(scores[window]), window, shown))
    return peaks
