"""`VideoIndex`: an index in memory, ready to be searched.

    index = VideoIndex.load("my.index")
    hits = index.search(model.encode_text(["two dogs run along the water"]), k=10)[0]

The model that belongs to an index is `search_model_of(index)`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.collection import FileStamp
from adaclip_finetune.search.nearest import FaissIndex
from adaclip_finetune.search.storage import THUMBS, StoredIndex, read_index

_REMEMBERED = 10_000  # rows that are kept parsed; a row takes about 5 kB


@dataclass(frozen=True)
class IndexedFrame:
    """A frame that a video's vector was made of."""

    index: int  # in the video, from 0
    time: float | None  # seconds, as a player counts; None where the source of the frames does not say
    weight: float  # its share of the vector; the weights of a video sum to 1


@dataclass(frozen=True)
class IndexedVideo:
    """One row of an index."""

    id: str
    path: Path  # the video file, the folder of its frames, or the pack that holds them
    duration: float | None  # seconds, where known
    frames: tuple[IndexedFrame, ...]  # in order of time
    best: int  # position in `frames` of the one with the greatest weight
    captions: tuple[str, ...]
    thumb: Path | None  # JPEG of the best frame
    stamp: FileStamp  # of `path` when it was indexed
    key: str  # digest of the row: it changes with the file, and no path can be derived from it

    @property
    def best_time(self) -> float | None:
        """Return the time in seconds of the frame with the greatest weight."""
        return self.frames[self.best].time if self.frames else None


@dataclass(frozen=True)
class Hit:
    """A video that a search found: `score` is its cosine with the query, `rank` counts from 1."""

    video: IndexedVideo
    score: float
    rank: int


class IndexedVideos:
    """The rows of an index. A row is parsed when it is first asked for, because a search looks at few of them."""

    def __init__(self, folder: Path, lines: list[bytes]) -> None:
        self._folder, self._lines = folder, lines
        self._parsed = lru_cache(_REMEMBERED)(self._parse)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, row: int) -> IndexedVideo:
        """Return one row. Raise UserError for a line that adaclip did not write."""
        return self._parsed(range(len(self))[row])

    def __iter__(self) -> Iterator[IndexedVideo]:
        return map(self._parsed, range(len(self)))

    def keys(self) -> list[str]:
        """Return the keys of all videos, without parsing their rows."""
        return [_key(line) for line in self._lines]

    def _parse(self, row: int) -> IndexedVideo:
        line = self._lines[row]
        try:
            facts = json.loads(line)
            video = IndexedVideo(
                id=facts["id"],
                path=Path(facts["path"]),
                duration=facts["duration"],
                frames=tuple(IndexedFrame(**frame) for frame in facts["frames"]),
                best=facts["best"],
                captions=tuple(facts["captions"]),
                thumb=self._folder / THUMBS / Path(facts["thumb"]).name if facts["thumb"] else None,
                stamp=FileStamp(facts["size"], facts["mtime_ns"]),
                key=_key(line),
            )
            _ = video.best_time
        except (KeyError, IndexError, TypeError, ValueError) as error:
            place = f"{self._folder / 'videos.jsonl'}, line {row + 1}"
            raise UserError(f"{place}: not a row that adaclip wrote ({error!r})") from error
        return video


class VideoIndex:
    """The videos of an index in the order of its rows, and their vectors."""

    def __init__(self, folder: Path, stored: StoredIndex, nearest: FaissIndex) -> None:
        self.folder, self.info, self.version = folder, stored.info, stored.version
        self.videos = IndexedVideos(folder, stored.lines)
        self.width = stored.vectors.shape[1]
        self._nearest = nearest

    @classmethod
    def load(cls, path: str | Path) -> VideoIndex:
        """Read the index that `adaclip index` wrote. Raise UserError if there is none, or it was altered."""
        stored = read_index(Path(path))
        built = FaissIndex.load(stored.graph) if stored.graph else FaissIndex.build(stored.vectors, stored.info.kind)
        return cls(Path(path), stored, built)

    def __len__(self) -> int:
        return len(self.videos)

    def search(self, vectors: Any, k: int, ranks: slice = slice(None)) -> list[list[Hit]]:
        """Return the k nearest videos to each query, best first; fewer if the index holds fewer.

        `vectors` (Q, D) is an array or a tensor with rows of any length. `ranks` selects from the k hits those that are
        wanted, for example `slice(10, 20)` for a second page. Raise UserError for vectors of another width and k < 1.
        """
        if k < 1:
            raise UserError(f"k {k}: a whole number from 1 up is needed")
        queries = np.asarray(vectors.detach().cpu() if hasattr(vectors, "detach") else vectors, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise UserError(f"{self.folder}: its vectors have width {self.width}, the query has shape {queries.shape}")
        length = np.linalg.norm(queries, axis=1, keepdims=True)
        if not (np.isfinite(length).all() and (length > 0).all()):
            raise UserError("a query's vector is zero or not finite: the model's weights have probably diverged")
        scores, rows = self._nearest.search(queries / length, k)
        return [self._hits(*found, ranks) for found in zip(scores.tolist(), rows.tolist(), strict=True)]

    def _hits(self, scores: list[float], rows: list[int], ranks: slice) -> list[Hit]:
        # A graph whose nodes are not all connected gives row -1 for what it did not reach.
        found = [(rank, score, row) for rank, (score, row) in enumerate(zip(scores, rows, strict=True), 1) if row >= 0]
        return [Hit(self.videos[row], score, rank) for rank, score, row in found[ranks]]


def _key(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:20]
