"""The index of a collection: one file on disk, and `VideoIndex` in memory, which searches it.

    index = VideoIndex.load("my.index")
    hits = index.search(model.encode_text(["two dogs run along the water"]), k=10)[0]

The folder of an index holds vectors.safetensors, with the vectors, their rows and what they were made with; thumbs/,
with a JPEG for each row; and, until indexing has finished, parts/ with finished batches. vectors.safetensors is
replaced as a whole, so a reader never sees parts of two indexes; videos.jsonl is a copy of its rows for other programs.
Beside the vector of each video there may be those of its parts (`moments.py`), which say where in the video a query is.
The model of an index is `search_model_of(index)`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

import faiss
import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from adaclip_finetune.data.frame_store import FileStamp
from adaclip_finetune.data.video.remote import RemotePath, path_of
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.hub import on_hub
from adaclip_finetune.search.peaks import find_peaks
from adaclip_finetune.search.transcripts import FoundLine
from adaclip_finetune.search.where import columns, conditions, rows_where

FILE, THUMBS, PARTS = "vectors.safetensors", "thumbs", "parts"
FORMAT = "adaclip-index/3"
_REMEMBERED = 10_000  # rows that are kept parsed; a row takes about 5 kB
_MANY_QUERIES, _BLOCK = 8, 16_384  # from how many queries on they are compared together, with so many vectors at a time
_NARROWED = 8  # narrowed searches whose videos are remembered
_FUSION = 60
MOMENTS_A_VIDEO = 5  # that a search for videos shows of each


@dataclass(frozen=True)
class IndexInfo:
    """What an index was made with."""

    fingerprint: str  # of the model
    run: str  # absolute path of the run folder, checkpoint or CLIP, or the name of a CLIP
    settings: dict[str, Any]  # settings that are needed beside the run to load the model, such as clip_weights
    source: str  # absolute path of the folder or annotation that was indexed
    untrained: bool = False  # whether the model is a pretrained CLIP
    moments: dict[str, Any] | None = None  # how videos were divided: `MomentSettings` as a dict
    shard: dict[str, Any] | None = None  # which part of an index it is: `Shard.facts`; None: a whole one

    @property
    def has_named_clip(self) -> bool:
        """Whether the model is a pretrained CLIP that open_clip knows by name."""
        return self.untrained and not Path(self.run).is_absolute()

    @property
    def model_name(self) -> str:
        """Return what to call the model: the name of its folder or file, or of the CLIP."""
        return self.run if self.has_named_clip or on_hub(self.run) else Path(self.run).name


class EmbeddedMoments(NamedTuple):
    """The parts of a video in order of time, as JSON holds them, and their vectors (M, D)."""

    rows: list[dict[str, Any]]
    vectors: NDArray[Any]


class EmbeddedVideo(NamedTuple):
    """A row of an index, as JSON holds it, its vector (D,), and its moments, if it was divided."""

    row: dict[str, Any]
    vector: NDArray[Any]
    moments: EmbeddedMoments | None = None

    def thumbs(self) -> set[str]:
        """Return the names of its pictures."""
        return {row["thumb"] for row in (self.row, *(self.moments.rows if self.moments else ()))}


class StoredMoments(NamedTuple):
    """Vectors (M, D) of the parts of all videos, how many parts each video has (V,), and a JSON list of them each."""

    vectors: NDArray[Any]
    counts: NDArray[np.int64]
    lines: list[bytes]

    def by_video(self) -> Iterator[EmbeddedMoments]:
        """Yield the moments of each video."""
        for line, vectors in zip(self.lines, np.split(self.vectors, self.counts.cumsum()[:-1]), strict=True):
            yield EmbeddedMoments(json.loads(line), vectors)


@dataclass(frozen=True)
class StoredIndex:
    """The content of an index on disk: vectors (V, D), float32 or float16, and as many rows, one JSON object each."""

    info: IndexInfo
    vectors: NDArray[Any]
    lines: list[bytes]
    moments: StoredMoments | None = None
    positions: NDArray[np.int64] | None = None  # (V,), of the rows of a part among all videos of the collection

    def videos(self) -> list[EmbeddedVideo]:
        """Return all rows, parsed, with their vectors and moments."""
        moments = self.moments.by_video() if self.moments and self.lines else repeat(None)
        return list(map(EmbeddedVideo, map(json.loads, self.lines), self.vectors, moments))


def read_index(folder: Path) -> StoredIndex:
    """Read an index. Raise UserError if there is none, or it is of another version or damaged."""
    path = folder / FILE
    if not path.exists():
        if not folder.exists():
            raise UserError(f"{folder}: there is no such folder; `adaclip index RUN VIDEOS -o {folder}` makes one")
        if (folder / PARTS).exists():
            raise UserError(f"{folder}: is not finished; `adaclip index RUN VIDEOS -o {folder}` continues it")
        raise UserError(f"{folder}: is not an index; give the folder that `adaclip index -o` made")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            facts = json.loads(file.metadata()[FORMAT])
            vectors, lines = file.get_tensor("vectors"), file.get_tensor("videos").tobytes().splitlines()
            moments = None
            if facts.get("moments"):
                of_moments, counts = file.get_tensor("moment_vectors"), file.get_tensor("moment_counts")
                moments = StoredMoments(of_moments, counts, file.get_tensor("moments").tobytes().splitlines())
            positions = file.get_tensor("positions") if facts.get("shard") else None
        return StoredIndex(IndexInfo(**facts), vectors, lines, moments, positions)
    except (OSError, ValueError, LookupError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path}: is damaged or of another version ({error!r}); index the videos again, into a new folder"
        ) from error


def write_index(
    folder: Path,
    info: IndexInfo,
    vectors: NDArray[Any],
    rows: Sequence[Mapping[str, Any]],
    moments: Sequence[EmbeddedMoments] = (),
    positions: Sequence[int] = (),
) -> None:
    """Replace the index in the folder as a whole. Raise OSError and leave the old one if that fails.

    `moments` are those of each row, if `info` says that there are any, and `positions` those of the rows of a part.
    """
    lines, facts = _json_lines(rows), asdict(info)
    tensors = {"vectors": np.ascontiguousarray(vectors), "videos": np.frombuffer(lines, np.uint8)}
    if info.shard is None:
        del facts["shard"]
    else:
        tensors["positions"] = np.array(positions, np.int64)
    if info.moments is None:
        del facts["moments"]  # the file is what it was before there were moments
    else:
        parts = [vectors[:0], *(one.vectors.astype(vectors.dtype) for one in moments)]
        tensors["moment_vectors"] = np.concatenate(parts)
        tensors["moment_counts"] = np.array([len(one.rows) for one in moments], np.int64)
        tensors["moments"] = np.frombuffer(_json_lines([one.rows for one in moments]), np.uint8)
        lines = _json_lines([{**row, "moments": one.rows} for row, one in zip(rows, moments, strict=True)])
    write_durably(folder / FILE, save(tensors, {FORMAT: json.dumps(facts)}))
    write_durably(folder / "videos.jsonl", lines)


def _json_lines(rows: Iterable[Any]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


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

    def __init__(self, folder: Path, lines: list[bytes]) -> None:
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
    """The videos of an index in the order of its rows, and their vectors in FAISS (Douze et al. 2024).

    Of videos with the same vectors a search finds the first, with the others as its copies; `distinct` is the number of
    different ones.
    """

    fuses = True

    def __init__(self, folder: Path, stored: StoredIndex) -> None:
        self.folder, self.info, self.videos = folder, stored.info, IndexedVideos(folder, stored.lines)
        self.width = stored.vectors.shape[1]
        firsts, own = first_of_equal(stored.vectors), np.arange(len(stored.vectors))
        self._rows = np.flatnonzero(firsts == own)
        self.distinct = len(self._rows)
        self._copies: dict[int, list[int]] = {}  # of the first row with a vector: the others
        for row in np.flatnonzero(firsts != own).tolist():
            self._copies.setdefault(int(firsts[row]), []).append(row)
        self._firsts = firsts
        self._selected = lru_cache(_NARROWED)(self._select)
        vectors = stored.vectors[self._rows] if self._copies else stored.vectors
        self._nearest = _flat_index(vectors)
        self.moments = None if stored.moments is None else IndexedMoments(folder, stored.moments, self._rows)

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
                for rank, (row, moment) in list(enumerate(islice(moments.best(query, selection), k), 1))[ranks]
            ]
            for query in unit_queries(vectors, k, self.width, self.folder)
        ]

    def ranked_by(self, score: Literal["whole", "moment"] | None = None) -> Literal["whole", "moment"]:
        """Return what ranks videos if `search` is given this `score`."""
        return score or ("moment" if self.info.untrained and self.moments is not None else "whole")

    def count(self, where: Sequence[str] = ()) -> int:
        """Return the number of different videos for which these conditions hold. Raise UserError."""
        return len(self._places(self._selected(tuple(where))))

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
        (places,) = self._nearest.search(vector[None], min(k, self.distinct))[1]
        return [self.videos[int(row)] for row in self._rows[places]], self._nearest.reconstruct_batch(places)

    def _select(self, where: tuple[str, ...]) -> _Narrowed:
        videos = np.ones(len(self), np.bool_)
        if where:
            videos = np.array(rows_where(self.videos.columns, conditions(where)), np.bool_)
        firsts = np.zeros(len(self), np.bool_)
        firsts[self._firsts[videos]] = True
        return _Narrowed(videos, firsts, not where)

    def _places(self, selection: _Narrowed) -> NDArray[np.int64]:
        """Return the positions in FAISS of the vectors of which a selection has a video."""
        return np.flatnonzero(selection.firsts[self._rows])

    def _by_whole(self, queries: NDArray[np.float32], k: int, selection: _Narrowed) -> list[list[tuple[float, int]]]:
        """Return score and row of the k videos whose vectors are nearest to each query."""
        places = None if selection.all else self._places(selection)
        scores, found = nearest(self._nearest, queries, k, places)
        rows = self._rows[found].tolist()
        return [list(zip(*one, strict=True)) for one in zip(scores.tolist(), rows, strict=True)]

    def _by_best(
        self, moments: IndexedMoments, query: NDArray[np.float32], selection: _Narrowed
    ) -> Iterator[tuple[float, int]]:
        """Yield score and row of all videos by their best windows, and after them of those that were not divided."""
        seen = set()
        for cosine, row, _ in moments.windows(query, selection):
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
    """The videos that a search may find (V,), and the rows whose vector one of them has (V,)."""

    videos: NDArray[np.bool_]
    firsts: NDArray[np.bool_]
    all: bool  # whether these are all videos


class IndexedMoments:
    """The windows or shots of the videos of an index, with their vectors, and what a query finds among them."""

    def __init__(self, folder: Path, stored: StoredMoments, rows: NDArray[np.int64]) -> None:
        """`rows` are the videos that are searched, without copies."""
        self._thumbs, self._lines = folder / THUMBS, stored.lines
        ends = stored.counts.cumsum()
        own = [np.arange(ends[row] - stored.counts[row], ends[row]) for row in rows.tolist()]
        places = np.concatenate([np.empty(0, np.int64), *own])
        self._nearest = _flat_index(stored.vectors[places])
        self._row = np.repeat(rows, stored.counts[rows])  # of each vector in `_nearest`: the video
        self._first = dict(zip(rows.tolist(), np.cumsum([0, *stored.counts[rows]]).tolist(), strict=False))
        self._parsed = lru_cache(_REMEMBERED // 10)(self._parse)

    def __len__(self) -> int:
        return len(self._row)

    def count(self, row: int) -> int:
        """Return the number of windows of a video."""
        return len(self._parsed(row).rows)

    def of_video(self, row: int, query: NDArray[np.float32]) -> list[FoundMoment]:
        """Return the moments of a video for a query (D,) of length 1, best first."""
        return list(self._found(row, query).values())

    def best(self, query: NDArray[np.float32], selection: _Narrowed) -> Iterator[tuple[int, FoundMoment]]:
        """Yield the moments of the selected videos, best first, with the rows of their videos."""
        found: dict[int, dict[int, FoundMoment]] = {}  # what has not been yielded
        for _, row, number in self.windows(query, selection):
            if row not in found:
                found[row] = self._found(row, query)
            if moment := found[row].pop(number, None):
                yield row, moment

    def windows(self, query: NDArray[np.float32], selection: _Narrowed) -> Iterator[tuple[float, int, int]]:
        """Yield score, row of the video, and number in it, of all windows of the selected videos, best first; a window
        may come again."""
        places = None if selection.all else np.flatnonzero(selection.firsts[self._row])
        seen, wanted, count = 0, 256, len(self) if places is None else len(places)
        while seen < count:
            (scores,), (found,) = nearest(self._nearest, query[None], wanted, places)
            for score, place in zip(scores.tolist(), found.tolist(), strict=True):
                row = int(self._row[place])
                yield score, row, place - self._first[row]
            seen, wanted = len(found), 4 * wanted

    def picture(self, row: int, number: int) -> Path:
        """Return the JPEG of the best frame of a window. Raise IndexError."""
        return self._thumbs / Path(self._parsed(row).rows[number]["thumb"]).name

    def _found(self, row: int, query: NDArray[np.float32]) -> dict[int, FoundMoment]:
        """Return the moments of a video by the number of their best window, best first."""
        parsed = self._parsed(row)
        if not parsed.rows:  # the video was no longer there when the others were divided
            return {}
        scores = self._nearest.reconstruct_n(self._first[row], len(parsed.rows)) @ query
        return found_moments(parsed, scores, self._thumbs)

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


def nearest(
    index: Any, queries: NDArray[np.float32], k: int, places: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the k largest products of each query (Q, D) with the vectors of a FAISS index, and their rows: (Q, k), or
    fewer if there are fewer vectors. Only those at `places`, if they are given, are compared.

    FAISS compares one query after another. Many of them are multiplied with a block of vectors at once, which takes a
    fraction of the time.
    """
    count = index.ntotal if places is None else len(places)
    k = min(k, count)
    if not k:
        return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    if len(queries) < _MANY_QUERIES:
        found = [_nearest_to_one(index, query, k, places) for query in queries]
        return np.stack([scores for scores, _ in found]), np.stack([rows for _, rows in found])
    asked = torch.from_numpy(np.ascontiguousarray(queries))
    best, rows = asked.new_empty(len(asked), 0), torch.empty(len(asked), 0, dtype=torch.int64)
    for start in range(0, count, _BLOCK):
        own = np.arange(start, min(start + _BLOCK, count)) if places is None else places[start : start + _BLOCK]
        block = torch.from_numpy(index.reconstruct_batch(own))
        scores, within = (asked @ block.T).topk(min(k, len(block)), dim=1)
        best, rows = torch.cat([best, scores], dim=1), torch.cat([rows, torch.from_numpy(own)[within]], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return best.numpy(), rows.numpy()


def _nearest_to_one(
    index: Any, query: NDArray[np.float32], k: int, places: NDArray[np.int64] | None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the k largest products of a query (D,) and their rows: (k,). Equal ones come in order of rows.

    FAISS returns any of several that are equal to the last one. It is asked for more until the last is a smaller one,
    so that pages of different lengths agree.
    """
    parameters, count = None, index.ntotal
    if places is not None:
        bits = np.zeros(count, np.bool_)
        bits[places] = True
        chosen = faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))  # type: ignore[arg-type, call-arg]
        parameters, count = faiss.SearchParameters(sel=chosen), len(places)  # type: ignore[call-arg]
    wanted = min(k + 1, count)
    while True:
        (scores,), (rows,) = index.search(query[None], wanted, params=parameters)
        if wanted == count or scores[k - 1] > scores[-1]:
            order = np.lexsort((rows, -scores))[:k]
            return scores[order], rows[order]
        wanted = min(4 * wanted, count)


def _fused(ranked: list[tuple[float, int]], others: list[int]) -> list[tuple[float, int]]:
    """Return score and row of videos, all of which are ranked, fused with another ranking of some of them.

    The fused score is the sum of 1 / (60 + rank) (reciprocal rank fusion, Cormack et al. 2009).
    """
    share = {row: 1 / (_FUSION + rank) for rank, row in enumerate(others, 1)}
    order = sorted(enumerate(ranked, 1), key=lambda one: -1 / (_FUSION + one[0]) - share.get(one[1][1], 0))
    return [video for _, video in order]


def first_of_equal(vectors: NDArray[Any]) -> NDArray[np.int64]:
    """Return for each of the vectors (V, D) the first row with the same bytes, which may be its own: (V,)."""
    content = np.ascontiguousarray(vectors).view(np.uint8)
    missing = -content.shape[1] % 8
    words = (np.pad(content, ((0, 0), (0, missing))) if missing else content).view(np.uint64)
    factors = np.random.default_rng(0).integers(0, 2**64, words.shape[1], dtype=np.uint64)
    # Sums modulo 2^64 are quick to compute and compare, and hardly ever equal for different vectors.
    _, firsts, inverse = np.unique(words @ factors, return_index=True, return_inverse=True)
    others = np.flatnonzero(firsts[inverse] != np.arange(len(content)))
    if (content[others] != content[firsts[inverse][others]]).any():
        _, firsts, inverse = np.unique(content, axis=0, return_index=True, return_inverse=True)
    first: NDArray[np.int64] = firsts[inverse.reshape(-1)].astype(np.int64)
    return first


def _flat_index(vectors: NDArray[Any]) -> Any:
    """Return a FAISS index of vectors (N, D), which is searched by inner product."""
    kind = "SQfp16" if vectors.dtype == np.float16 else "Flat"  # float16 stays float16 in memory
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.add(np.ascontiguousarray(vectors, np.float32))
    return index


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
