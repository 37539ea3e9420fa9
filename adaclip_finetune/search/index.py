"""The index of a collection: one file on disk, and `VideoIndex` in memory, which searches it.

    index = VideoIndex.load("my.index")
    hits = index.search(model.encode_text(["two dogs run along the water"]), k=10)[0]

The folder of an index holds vectors.safetensors (`stored.py`); thumbs/, with a JPEG for each row; and, until indexing
has finished, parts/ with finished batches. Beside the vector of each video there may be those of its parts
(`moments.py`), which say where in the video a query is.
The model of an index is `search_model_of(index)`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.frame_store import FileStamp
from adaclip_finetune.data.video.remote import RemotePath, path_of
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.indexed_moments import FoundMoment, IndexedMoments
from adaclip_finetune.search.nearest import nearest
from adaclip_finetune.search.stored import Lines, StoredIndex, read_index
from adaclip_finetune.search.transcripts import FoundLine
from adaclip_finetune.search.where import columns, conditions, rows_where

THUMBS = "thumbs"
_REMEMBERED = 10_000  # rows that are kept parsed; a row takes about 5 kB
_NARROWED = 8  # narrowed searches whose videos are remembered
_FUSION = 60
MOMENTS_A_VIDEO = 5  # that a search for videos shows of each


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
    path: Path | RemotePath  # the video file, the folder of its frames, or the pack that holds them
    duration: float | None  # seconds, where known
    frames: tuple[IndexedFrame, ...]  # in order of time
    best: int  # position in `frames` of the one with the greatest weight
    captions: tuple[str, ...]
    thumb: Path  # JPEG of the best frame
    stamp: FileStamp  # of `path` when it was indexed
    key: str  # digest of the row: it changes with the file, and no path can be derived from it
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)  # from the annotation or beside the file

    @property
    def best_time(self) -> float | None:
        """Return the time in seconds of the frame with the greatest weight."""
        return self.frames[self.best].time if self.frames else None


@dataclass(frozen=True)
class Hit:
    """A video that a search found: `score` is its cosine with the query, `rank` counts from 1.

    `copies` are the other videos with the same vector: copies of the file, as a rule. `moments` are the best parts of
    the video, best first, if the index has any; where moments are searched, the one that was found, whose score it is.
    `line` is what is said in it, where transcripts are searched, too.
    """

    video: IndexedVideo
    score: float
    rank: int
    copies: tuple[IndexedVideo, ...] = ()
    moments: tuple[FoundMoment, ...] = ()
    line: FoundLine | None = None


class IndexedVideos:
    """The rows of an index. A row is parsed when it is first asked for, because a search looks at few of them."""

    def __init__(self, folder: Path, lines: Lines) -> None:
        self._thumbs, self._lines = folder / THUMBS, lines
        self._parsed = lru_cache(_REMEMBERED)(self._parse)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, row: int) -> IndexedVideo:
        return self._parsed(row)

    def __iter__(self) -> Iterator[IndexedVideo]:
        return map(self._parsed, range(len(self)))

    def keys(self) -> list[str]:
        """Return the keys of all videos, without parsing their rows."""
        return [key_of(line) for line in self._lines]

    def _parse(self, row: int) -> IndexedVideo:
        return indexed_video(self._lines[row], self._thumbs)

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """What each video has in each field that a condition may name; reading it takes a pass over all rows."""
        return columns(self._lines)


class VideoIndex:
    """The videos of an index in the order of its rows, all of whose vectors a search compares with the query.

    Of videos with the same vectors a search finds the first, with the others as its copies; `distinct` is the number of
    different ones.
    """

    fuses = True

    def __init__(self, folder: Path, stored: StoredIndex) -> None:
        self.folder, self.info, self.videos = folder, stored.info, IndexedVideos(folder, stored.lines)
        self.width = stored.vectors.shape[1]
        self._vectors, self._firsts = stored.vectors, stored.firsts
        others = np.flatnonzero(self._firsts != np.arange(len(self._firsts))).tolist()
        self.distinct = len(self._firsts) - len(others)
        self._copies: dict[int, list[int]] = {}  # of the first row with a vector: the others
        for row in others:
            self._copies.setdefault(int(self._firsts[row]), []).append(row)
        self._selected = lru_cache(_NARROWED)(self._select)
        self.moments = None if stored.moments is None else IndexedMoments(folder / THUMBS, stored.moments)

    @property
    def place(self) -> str:
        """Return where it is, for messages."""
        return str(self.folder)

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return Path(os.path.abspath(self.folder)).name  # noqa: PTH100 (a link keeps its own name)

    @classmethod
    def load(cls, path: str | Path) -> VideoIndex:
        """Read the index that `adaclip index` wrote. Raise UserError if there is none, or it is damaged."""
        return cls(Path(path), read_index(Path(path)))

    def __len__(self) -> int:
        return len(self.videos)

    def search(
        self,
        vectors: Any,
        k: int,
        ranks: slice = slice(None),
        score: Literal["whole", "moment"] | None = None,
        where: Sequence[str] = (),
        lines: Sequence[Mapping[str, FoundLine]] | None = None,
    ) -> list[list[Hit]]:
        """Return the k best videos for each query, best first; fewer if the index holds fewer. Copies count as one.

        `vectors` (Q, D) is an array or a tensor with rows of any length. `ranks` selects from the k hits those that are
        wanted, for example `slice(10, 20)` for a second page. `score` ranks videos by their own vector (`whole`) or
        that of their best window (`moment`), which is the default for a pretrained CLIP. With `where`, only videos of
        which these conditions hold are compared (`where.py`). `lines` are what `Transcripts.find` found for each query:
        the ranks among them and among the vectors are then fused. Raise UserError for vectors of another width, k < 1,
        conditions that are none, and `moment` without moments.
        """
        queries, selection = unit_queries(vectors, k, self.width, self.folder), self._selected(tuple(where))
        moments = self.need_moments() if self.ranked_by(score) == "moment" else None
        depth = k if lines is None else max(k, self.distinct)  # ranks are fused over all videos
        found: Iterable[Iterable[tuple[float, int]]]
        if moments is None:
            found = self._by_whole(queries, depth, selection)
        else:
            found = [islice(self._by_best(moments, query, selection), depth) for query in queries]
        said: Sequence[dict[int, FoundLine]] = [{}] * len(queries)
        if lines is not None:
            said = [self._rows_of(one, selection) for one in lines]
            found = [_fused(list(videos), list(one))[:k] for videos, one in zip(found, said, strict=True)]
        return [
            [
                self._hit(row, rank, cosine, selection, self._moments_of(row, query), own.get(row))
                for rank, (cosine, row) in list(enumerate(videos, 1))[ranks]
            ]
            for query, videos, own in zip(queries, found, said, strict=True)
        ]

    def search_moments(
        self, vectors: Any, k: int, ranks: slice = slice(None), where: Sequence[str] = ()
    ) -> list[list[Hit]]:
        """Return the k best moments of all videos for each query, best first; a video may have several.

        The arguments are those of `search`. Raise UserError if the index has no moments.
        """
        moments, selection = self.need_moments(), self._selected(tuple(where))
        return [
            [
                self._hit(row, rank, moment.score, selection, (moment,))
                for rank, (row, moment) in list(enumerate(islice(moments.best(query, selection.windows), k), 1))[ranks]
            ]
            for query in unit_queries(vectors, k, self.width, self.folder)
        ]

    def ranked_by(self, score: Literal["whole", "moment"] | None = None) -> Literal["whole", "moment"]:
        """Return what ranks videos if `search` is given this `score`."""
        return score or ("moment" if self.info.untrained and self.moments is not None else "whole")

    def count(self, where: Sequence[str] = ()) -> int:
        """Return the number of different videos for which these conditions hold. Raise UserError."""
        vectors = self._selected(tuple(where)).vectors
        return self.distinct if vectors is None else int(np.count_nonzero(vectors))

    def find(self, key: str) -> IndexedVideo | None:
        """Return the video of a key, or None."""
        row = self._by_key.get(key)
        return None if row is None else self.videos[row]

    def moment_picture(self, key: str, number: int) -> Path | None:
        """Return the JPEG of the best frame of a window of the video of a key, or None if it has no such window."""
        row = self._by_key.get(key)
        if row is None or self.moments is None or number >= self.moments.count(row):
            return None
        return self.moments.picture(row, number)

    @cached_property
    def _by_key(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.videos.keys())}

    def need_moments(self) -> IndexedMoments:
        """Return the moments of the index. Raise UserError if it has none."""
        if self.moments is None:
            way_out = "`adaclip index … --moments`, with its model and its videos, adds them"
            raise UserError(f"{self.folder}: has no moments; {way_out}")
        return self.moments

    def nearest(self, vector: NDArray[np.float32], k: int) -> tuple[list[IndexedVideo], NDArray[np.float32]]:
        """Return the k nearest videos to a unit vector (D,), best first and copies as one, and their vectors (k, D)."""
        rows = nearest(self._vectors, vector[None], k, self._selected(()).vectors)[1][0]
        return [self.videos[row] for row in rows.tolist()], self._vectors[rows].astype(np.float32)

    def _select(self, where: tuple[str, ...]) -> _Narrowed:
        videos, vectors = np.ones(len(self), np.bool_), None
        if where:
            videos = np.array(rows_where(self.videos.columns, conditions(where)), np.bool_)
        if where or self._copies:
            vectors = np.zeros(len(self), np.bool_)
            vectors[self._firsts[videos]] = True
        windows = None if vectors is None or self.moments is None else self.moments.among(vectors)
        return _Narrowed(videos, vectors, windows)

    def _by_whole(self, queries: NDArray[np.float32], k: int, selection: _Narrowed) -> list[list[tuple[float, int]]]:
        """Return score and row of the k videos whose vectors are nearest to each query."""
        scores, rows = nearest(self._vectors, queries, k, selection.vectors)
        return [list(zip(*one, strict=True)) for one in zip(scores.tolist(), rows.tolist(), strict=True)]

    def _by_best(
        self, moments: IndexedMoments, query: NDArray[np.float32], selection: _Narrowed
    ) -> Iterator[tuple[float, int]]:
        """Yield score and row of all videos by their best windows, and after them of those that were not divided."""
        seen = set()
        for cosine, row, _ in moments.windows(query, selection.windows):
            if row not in seen:
                seen.add(row)
                yield cosine, row
        yield from (one for one in self._by_whole(query[None], self.distinct, selection)[0] if one[1] not in seen)

    def _rows_of(self, lines: Mapping[str, FoundLine], selection: _Narrowed) -> dict[int, FoundLine]:
        """Return the lines of videos by the rows that a search finds, in the same order."""
        found: dict[int, FoundLine] = {}
        for name, line in lines.items():
            row = self._row_of.get(name)
            if row is not None and selection.videos[row]:
                found.setdefault(int(self._firsts[row]), line)
        return found

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.videos.columns["name"])}

    def _moments_of(self, row: int, query: NDArray[np.float32]) -> list[FoundMoment]:
        return self.moments.of_video(row, query) if self.moments else []

    def _hit(
        self,
        row: int,
        rank: int,
        score: float,
        selection: _Narrowed,
        moments: Sequence[FoundMoment],
        line: FoundLine | None = None,
    ) -> Hit:
        """Return a hit of the first video with the vector of `row` that is selected, with the others as its copies."""
        videos = [self.videos[one] for one in (row, *self._copies.get(row, ())) if selection.videos[one]]
        return Hit(videos[0], score, rank, tuple(videos[1:]), tuple(moments[:MOMENTS_A_VIDEO]), line)


class _Narrowed(NamedTuple):
    """What a search may find: the videos (V,), and the vectors (V,) and windows (M,) that are compared (None: all)."""

    videos: NDArray[np.bool_]
    vectors: NDArray[np.bool_] | None
    windows: NDArray[np.bool_] | None


def unit_queries(vectors: Any, k: int, width: int, place: object) -> NDArray[np.float32]:
    """Return queries (Q, D), an array or a tensor, scaled to length 1. Raise UserError for k < 1, for queries of
    another width than that of the index, which `place` names, and for a query that is zero or not finite."""
    if k < 1:
        raise UserError(f"k {k}: a whole number from 1 up is needed")
    queries = np.asarray(vectors.detach().cpu() if hasattr(vectors, "detach") else vectors, np.float32)
    if queries.ndim != 2 or queries.shape[1] != width:
        raise UserError(f"{place}: its vectors have width {width}, the query has shape {queries.shape}")
    length = np.linalg.norm(queries, axis=1, keepdims=True)
    if not (np.isfinite(length).all() and (length > 0).all()):
        raise UserError("a query's vector is zero or not finite: the model's weights have probably diverged")
    unit: NDArray[np.float32] = queries / length
    return unit


def _fused(ranked: list[tuple[float, int]], others: list[int]) -> list[tuple[float, int]]:
    """Return score and row of videos, all of which are ranked, fused with another ranking of some of them.

    The fused score is the sum of 1 / (60 + rank) (reciprocal rank fusion, Cormack et al. 2009).
    """
    share = {row: 1 / (_FUSION + rank) for rank, row in enumerate(others, 1)}
    order = sorted(enumerate(ranked, 1), key=lambda one: -1 / (_FUSION + one[0]) - share.get(one[1][1], 0))
    return [video for _, video in order]


def indexed_video(line: bytes, thumbs: Path) -> IndexedVideo:
    """Return a row of an index, whose pictures lie in `thumbs`."""
    facts = json.loads(line)
    return IndexedVideo(
        id=facts["id"],
        path=path_of(facts["path"]),
        duration=facts["duration"],
        frames=tuple(IndexedFrame(**frame) for frame in facts["frames"]),
        best=facts["best"],
        captions=tuple(facts["captions"]),
        thumb=thumbs / Path(facts["thumb"]).name,
        stamp=FileStamp(facts["size"], facts["mtime_ns"]),
        key=key_of(line),
        metadata=facts.get("metadata", {}),
    )


def key_of(line: bytes) -> str:
    """Return the key of the video of a row: a digest of it, 20 hexadecimal digits."""
    return hashlib.sha256(line).hexdigest()[:20]
