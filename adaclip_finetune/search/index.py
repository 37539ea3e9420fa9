"""The index of a collection: one file on disk, and `VideoIndex` in memory, which searches it.

    index = VideoIndex.load("my.index")
    hits = index.search(model.encode_text(["two dogs run along the water"]), k=10)[0]

The folder of an index holds vectors.safetensors, with the vectors, their rows and what they were made with; thumbs/,
with a JPEG for each row; and, until indexing has finished, parts/ with finished batches. vectors.safetensors is
replaced as a whole, so a reader never sees parts of two indexes; videos.jsonl is a copy of its rows for other programs.
The model of an index is `search_model_of(index)`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save

from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.collection import FileStamp

FILE, THUMBS, PARTS = "vectors.safetensors", "thumbs", "parts"
FORMAT = "adaclip-index/3"
_REMEMBERED = 10_000  # rows that are kept parsed; a row takes about 5 kB


@dataclass(frozen=True)
class IndexInfo:
    """What an index was made with."""

    fingerprint: str  # of the model
    run: str  # absolute path of the run folder, checkpoint or CLIP, or the name of a CLIP
    settings: dict[str, Any]  # settings that are needed beside the run to load the model, such as clip_weights
    source: str  # absolute path of the folder or annotation that was indexed
    untrained: bool = False  # whether the model is a pretrained CLIP

    @property
    def has_named_clip(self) -> bool:
        """Whether the model is a pretrained CLIP that open_clip knows by name."""
        return self.untrained and not Path(self.run).is_absolute()

    @property
    def model_name(self) -> str:
        """Return what to call the model: the name of its folder or file, or of the CLIP."""
        return self.run if self.has_named_clip else Path(self.run).name


class EmbeddedVideo(NamedTuple):
    """A row of an index, as JSON holds it, and its vector (D,)."""

    row: dict[str, Any]
    vector: NDArray[Any]


@dataclass(frozen=True)
class StoredIndex:
    """The content of an index on disk: vectors (V, D), float32 or float16, and as many rows, one JSON object each."""

    info: IndexInfo
    vectors: NDArray[Any]
    lines: list[bytes]

    def videos(self) -> list[EmbeddedVideo]:
        """Return all rows, parsed, with their vectors."""
        return list(map(EmbeddedVideo, map(json.loads, self.lines), self.vectors))


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
        return StoredIndex(IndexInfo(**facts), vectors, lines)
    except (OSError, ValueError, LookupError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path}: is damaged or of another version ({error!r}); index the videos again, into a new folder"
        ) from error


def write_index(folder: Path, info: IndexInfo, vectors: NDArray[Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the index in the folder as a whole. Raise OSError and leave the old one if that fails."""
    lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    tensors = {"vectors": np.ascontiguousarray(vectors), "videos": np.frombuffer(lines, np.uint8)}
    write_durably(folder / FILE, save(tensors, {FORMAT: json.dumps(asdict(info))}))
    write_durably(folder / "videos.jsonl", lines)


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
    thumb: Path  # JPEG of the best frame
    stamp: FileStamp  # of `path` when it was indexed
    key: str  # digest of the row: it changes with the file, and no path can be derived from it

    @property
    def best_time(self) -> float | None:
        """Return the time in seconds of the frame with the greatest weight."""
        return self.frames[self.best].time if self.frames else None


@dataclass(frozen=True)
class Hit:
    """A video that a search found: `score` is its cosine with the query, `rank` counts from 1.

    `copies` are the other videos with the same vector: copies of the file, as a rule.
    """

    video: IndexedVideo
    score: float
    rank: int
    copies: tuple[IndexedVideo, ...] = ()


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
        return [_key(line) for line in self._lines]

    def _parse(self, row: int) -> IndexedVideo:
        facts = json.loads(self._lines[row])
        return IndexedVideo(
            id=facts["id"],
            path=Path(facts["path"]),
            duration=facts["duration"],
            frames=tuple(IndexedFrame(**frame) for frame in facts["frames"]),
            best=facts["best"],
            captions=tuple(facts["captions"]),
            thumb=self._thumbs / Path(facts["thumb"]).name,
            stamp=FileStamp(facts["size"], facts["mtime_ns"]),
            key=_key(self._lines[row]),
        )


class VideoIndex:
    """The videos of an index in the order of its rows, and their vectors in FAISS (Douze et al. 2024).

    Of videos with the same vector a search finds the first, with the others as its copies; `distinct` is the number of
    different vectors.
    """

    def __init__(self, folder: Path, stored: StoredIndex) -> None:
        self.folder, self.info, self.videos = folder, stored.info, IndexedVideos(folder, stored.lines)
        self.width = stored.vectors.shape[1]
        kind = "SQfp16" if stored.vectors.dtype == np.float16 else "Flat"  # float16 stays float16 in memory
        self._nearest = faiss.index_factory(self.width, kind, faiss.METRIC_INNER_PRODUCT)
        firsts: dict[bytes, int] = {}
        self._copies: dict[int, list[int]] = {}  # of the first row with a vector: the others
        for row, vector in enumerate(stored.vectors):
            first = firsts.setdefault(hashlib.blake2b(vector.tobytes(), digest_size=16).digest(), row)
            if first != row:
                self._copies.setdefault(first, []).append(row)
        self._rows, self.distinct = np.fromiter(firsts.values(), np.int64), len(firsts)
        vectors = stored.vectors[self._rows] if self._copies else stored.vectors
        self._nearest.add(np.ascontiguousarray(vectors, np.float32))

    @classmethod
    def load(cls, path: str | Path) -> VideoIndex:
        """Read the index that `adaclip index` wrote. Raise UserError if there is none, or it is damaged."""
        return cls(Path(path), read_index(Path(path)))

    def __len__(self) -> int:
        return len(self.videos)

    def search(self, vectors: Any, k: int, ranks: slice = slice(None)) -> list[list[Hit]]:
        """Return the k nearest videos to each query, best first; fewer if the index holds fewer. Copies count as one.

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
        if not len(self):
            return [[] for _ in queries]
        scores, places = self._nearest.search(queries / length, min(k, self.distinct))
        return [
            [self._hit(rank, score, int(row)) for rank, (score, row) in list(enumerate(found, 1))[ranks]]
            for found in (zip(*one, strict=True) for one in zip(scores.tolist(), self._rows[places], strict=True))
        ]

    def nearest(self, vector: NDArray[np.float32], k: int) -> tuple[list[IndexedVideo], NDArray[np.float32]]:
        """Return the k nearest videos to a unit vector (D,), best first and copies as one, and their vectors (k, D)."""
        (places,) = self._nearest.search(vector[None], min(k, self.distinct))[1]
        return [self.videos[int(row)] for row in self._rows[places]], self._nearest.reconstruct_batch(places)

    def _hit(self, rank: int, score: float, row: int) -> Hit:
        return Hit(self.videos[row], score, rank, tuple(self.videos[copy] for copy in self._copies.get(row, ())))


def _key(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:20]
