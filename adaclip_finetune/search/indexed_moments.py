"""The windows or shots of the videos of an index, and what a query finds among them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.search.nearest import nearest, products
from adaclip_finetune.search.peaks import find_peaks
from adaclip_finetune.search.stored import StoredMoments

_REMEMBERED = 1000  # videos whose windows are kept parsed


@dataclass(frozen=True)
class FoundMoment:
    """A part of a video that a query means. `score` is the cosine of the query and the best window in it."""

    start: float  # seconds, as a player counts
    end: float
    score: float
    time: float  # of the best frame of a window in it, seconds
    thumb: Path  # JPEG of this frame
    number: int  # of the window that the frame is from, from 0

    @property
    def span(self) -> tuple[float, float]:
        """Return start and end."""
        return self.start, self.end


class IndexedMoments:
    """The windows or shots of the videos of an index, with their vectors, and what a query finds among them."""

    def __init__(self, thumbs: Path, stored: StoredMoments) -> None:
        """`thumbs` is the folder of the pictures."""
        self._thumbs, self._lines, self._vectors = thumbs, stored.lines, stored.vectors
        self._first = stored.counts.cumsum() - stored.counts  # (V,), of the windows of each video
        self._row = np.repeat(np.arange(len(stored.counts)), stored.counts)  # (M,), the video of each window
        self._parsed = lru_cache(_REMEMBERED)(self._parse)

    def __len__(self) -> int:
        return len(self._row)

    def count(self, row: int) -> int:
        """Return the number of windows of a video."""
        return len(self._parsed(row).rows)

    def among(self, videos: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which windows (M,) are those of these videos (V,)."""
        return videos[self._row]

    def of_video(self, row: int, query: NDArray[np.float32]) -> list[FoundMoment]:
        """Return the moments of a video for a query (D,) of length 1, best first."""
        return list(self._found(row, query).values())

    def best(self, query: NDArray[np.float32], chosen: NDArray[np.bool_] | None) -> Iterator[tuple[int, FoundMoment]]:
        """Yield the moments among the chosen windows (M,), or all, best first, with the rows of their videos."""
        found: dict[int, dict[int, FoundMoment]] = {}  # what has not been yielded
        for _, row, number in self.windows(query, chosen):
            if row not in found:
                found[row] = self._found(row, query)
            if moment := found[row].pop(number, None):
                yield row, moment

    def windows(self, query: NDArray[np.float32], chosen: NDArray[np.bool_] | None) -> Iterator[tuple[float, int, int]]:
        """Yield score, row of the video, and number in it, of the chosen windows (M,), or all, best first; a window may
        come again."""
        seen, wanted, count = 0, 256, len(self) if chosen is None else int(np.count_nonzero(chosen))
        while seen < count:
            (scores,), (found,) = nearest(self._vectors, query[None], wanted, chosen)
            for score, place in zip(scores.tolist(), found.tolist(), strict=True):
                row = int(self._row[place])
                yield score, row, place - int(self._first[row])
            seen, wanted = len(found), 4 * wanted

    def picture(self, row: int, number: int) -> Path:
        """Return the JPEG of the best frame of a window. Raise IndexError."""
        return self._thumbs / Path(self._parsed(row).rows[number]["thumb"]).name

    def _found(self, row: int, query: NDArray[np.float32]) -> dict[int, FoundMoment]:
        """Return the moments of a video by the number of their best window, best first."""
        parsed = self._parsed(row)
        if not parsed.rows:  # the video was no longer there when the others were divided
            return {}
        own = self._vectors[self._first[row] :][: len(parsed.rows)]
        return found_moments(parsed, products(query[None], own)[0], self._thumbs)

    def _parse(self, row: int) -> Windows:
        return Windows.of(json.loads(self._lines[row]))


class Windows(NamedTuple):
    """The windows of a video: spans (M, 2), and times (M,) of their best frames."""

    rows: list[dict[str, Any]]
    spans: NDArray[np.float64]
    times: NDArray[np.float64]

    @classmethod
    def of(cls, rows: list[dict[str, Any]]) -> Windows:
        """Return the windows of these rows."""
        spans = np.array([(one["start"], one["end"]) for one in rows], np.float64)
        return cls(rows, spans, np.array([one["time"] for one in rows], np.float64))


def found_moments(windows: Windows, scores: NDArray[np.float32], thumbs: Path) -> dict[int, FoundMoment]:
    """Return the moments of a video by the number of their best window, best first; `scores` (M,) are the cosines of
    its windows with the query, and pictures lie in `thumbs`."""
    found = {}
    for peak in find_peaks(windows.spans, windows.times, scores.astype(np.float64)):
        time, thumb = float(windows.times[peak.shown]), thumbs / Path(windows.rows[peak.shown]["thumb"]).name
        found[peak.best] = FoundMoment(peak.start, peak.end, peak.score, time, thumb, peak.shown)
    return found
