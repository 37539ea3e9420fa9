"""`VideoIndex`: what `adaclip index` made of a library of videos, in memory and ready to be asked.

    index = VideoIndex.load("my.index")
    hits = index.search(model.encode_text(["two dogs run along the water"]), k=10)[0]

The model is `retriever_of(index)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.about import About
from adaclip_finetune.search.json_lines import JsonLines
from adaclip_finetune.search.nearest import Nearest, load
from adaclip_finetune.search.stamp import Stamp
from adaclip_finetune.search.stored import THUMBS, read_index


@dataclass(frozen=True)
class IndexedVideo:
    """One row. `frames`, `times` and `weights` are of the frames that its vector was made of, in the order of time;
    `best` is the place among them of the one that weighs most."""

    id: str
    path: Path  # the video's file, a folder of frames, or a pack of them
    duration: float | None  # seconds, where known
    frames: tuple[int, ...]  # from 0
    times: tuple[float | None, ...]  # seconds, as a player counts; None where the frames' source does not tell
    weights: tuple[float, ...]  # sum 1
    best: int
    captions: tuple[str, ...]
    thumb: Path | None  # a picture of the best frame
    stamp: Stamp  # of what is at `path`, as it was indexed; search/stamp.py:stamp_of tells what it is now
    digest: str  # SHA-256 of the row: all that is told here

    @property
    def best_time(self) -> float | None:
        """Of the frame that weighs most: seconds, as a player counts."""
        return self.times[self.best] if self.times else None


@dataclass(frozen=True)
class Hit:
    """An answer: `score` is the cosine, `rank` counts from 1."""

    video: IndexedVideo
    score: float
    rank: int


class IndexedVideos(Sequence[IndexedVideo]):
    """Rows, made of their lines when they are asked for; that raises UserError for a line of another form."""

    def __init__(self, folder: Path, lines: JsonLines) -> None:
        self._folder, self._thumbs, self._lines = folder, folder / THUMBS, lines

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, place: int) -> IndexedVideo: ...
    @overload
    def __getitem__(self, place: slice) -> list[IndexedVideo]: ...
    def __getitem__(self, place: int | slice) -> IndexedVideo | list[IndexedVideo]:
        rows = range(len(self))[place]
        return self._video(rows) if isinstance(rows, int) else [self._video(row) for row in rows]

    def digests(self) -> list[str]:
        """Those of all videos; no line is parsed for them."""
        return [self._lines.digest(row) for row in range(len(self))]

    def _video(self, row: int) -> IndexedVideo:
        try:
            return _video(self._lines[row], self._thumbs, self._lines.digest(row))
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{self._folder / 'videos.jsonl'}, line {row + 1}: not as adaclip writes it ({error!r})"
            ) from error


class VideoIndex:
    """The videos of an index in the order of its rows, and their vectors. `version` is another one whenever the folder
    was written anew: search/stored.py:version_of tells which one it holds now."""

    def __init__(
        self, folder: Path, about: About, videos: IndexedVideos, nearest: Nearest, width: int, version: str
    ) -> None:
        self.folder, self.about, self.videos, self.width, self.version = folder, about, videos, width, version
        self._nearest = nearest

    @classmethod
    def load(cls, path: str | Path) -> VideoIndex:
        """Raises UserError where there is no index, or it was altered."""
        folder = Path(path)
        stored = read_index(folder)
        nearest = load(folder, stored.vectors, stored.about.kind, stored.digest)
        videos = IndexedVideos(folder, stored.lines)
        return cls(folder, stored.about, videos, nearest, stored.vectors.shape[1], stored.version)

    def __len__(self) -> int:
        return len(self.videos)

    def search(self, vectors: Any, k: int) -> list[list[Hit]]:
        """The k nearest videos, fewer if there are no more, to each of the vectors (Q, D), an array or a tensor of any
        length of rows: they are normalised here. Raises UserError for vectors of another width, and for k < 1."""
        if k < 1:
            raise UserError(f"k {k}: a whole number from 1 up is needed")
        queries = np.asarray(vectors.detach().cpu() if hasattr(vectors, "detach") else vectors, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise UserError(
                f"{self.folder}: its vectors have the width {self.width}, a query the shape {queries.shape}"
            )
        length = np.linalg.norm(queries, axis=1, keepdims=True)
        if not (np.isfinite(length).all() and (length > 0).all()):
            raise UserError("a query's vector is zero or not finite: the model's weights have probably diverged")
        scores, rows = self._nearest.search(queries / length, k)
        return [self._hits(*found) for found in zip(scores.tolist(), rows.tolist(), strict=True)]

    def check_model(self, fingerprint: str) -> None:
        """Raises UserError if that is not the model whose vectors these are."""
        if fingerprint != self.about.fingerprint:
            raise UserError(
                f"{self.folder}: was made with another model ({self.about.run}, fingerprint "
                f"{self.about.fingerprint[:12]}; this one has {fingerprint[:12]}), and vectors of two models cannot be "
                "compared: give the model that it was made with (--model), or index the videos anew"
            )

    def _hits(self, scores: list[float], rows: list[int]) -> list[Hit]:
        # A graph that is not all connected gives -1 for what it did not reach.
        found = [(score, row) for score, row in zip(scores, rows, strict=True) if row >= 0]
        return [Hit(self.videos[row], score, rank) for rank, (score, row) in enumerate(found, 1)]


def _video(row: Any, thumbs: Path, digest: str) -> IndexedVideo:
    """Raises what comes of a row of another form."""
    frames: Sequence[Mapping[str, Any]] = row["frames"]
    times = tuple(None if frame["time"] is None else float(frame["time"]) for frame in frames)
    best = int(row["best"])
    if times and not 0 <= best < len(times):
        raise IndexError(f"best {best} of {len(times)} frames")
    return IndexedVideo(
        id=str(row["id"]),
        path=Path(row["path"]),
        duration=None if row["duration"] is None else float(row["duration"]),
        frames=tuple(int(frame["index"]) for frame in frames),
        times=times,
        weights=tuple(float(frame["weight"]) for frame in frames),
        best=best,
        captions=tuple(map(str, row["captions"])),
        thumb=thumbs / Path(row["thumb"]).name if row["thumb"] else None,
        stamp=Stamp(int(row["size"]), int(row["mtime_ns"])),
        digest=digest,
    )
