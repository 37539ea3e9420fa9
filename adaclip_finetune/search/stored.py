"""The index of a collection on disk: vectors.safetensors, with vectors, rows, and what they were made with.

It is replaced as a whole, so a reader never sees parts of two indexes; videos.jsonl is a copy of its rows for other
programs. A reader maps the file into memory: what is opened is read from disk when it is first needed, and takes no
memory of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save

from adaclip_finetune.data.frame_store import stamp_of
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.hub import on_hub
from adaclip_finetune.search.nearest import first_of_equal

FILE, PARTS = "vectors.safetensors", "parts"
FORMAT = "adaclip-index/3"


class Lines:
    """Lines of a text, each of which is copied from it when it is asked for."""

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64] | None = None) -> None:
        """`ends` are the positions behind the line breaks; without them, the whole text is read."""
        self._text, self._ends = text, np.flatnonzero(text == ord("\n")) + 1 if ends is None else ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> bytes:
        start = self._ends[number - 1] if number else 0
        return self._text[start : self._ends[number] - 1].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[number] for number in range(len(self)))


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
    lines: Lines

    def by_video(self) -> Iterator[EmbeddedMoments]:
        """Yield the moments of each video."""
        for line, vectors in zip(self.lines, np.split(self.vectors, self.counts.cumsum()[:-1]), strict=True):
            yield EmbeddedMoments(json.loads(line), vectors)


@dataclass(frozen=True)
class StoredIndex:
    """The content of an index on disk: vectors (V, D), float32 or float16, and as many rows, one JSON object each."""

    info: IndexInfo
    vectors: NDArray[Any]
    lines: Lines
    firsts: NDArray[np.int64]  # (V,), of each vector the first row with the same one
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
        before = None
        while before != (before := stamp_of(path)):  # it is opened twice, and may be replaced in between
            with safetensors.safe_open(path, framework="pt") as file:  # which maps the file; with "np" it would be read
                tensors = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
                facts = json.loads(file.metadata()[FORMAT])
        vectors, firsts = tensors["vectors"], tensors.get("firsts")
        moments = None
        if facts.get("moments"):
            lines = Lines(tensors["moments"], tensors.get("moment_ends"))
            moments = StoredMoments(tensors["moment_vectors"], tensors["moment_counts"], lines)
        return StoredIndex(
            IndexInfo(**facts),
            vectors,
            Lines(tensors["videos"], tensors.get("ends")),
            first_of_equal(vectors) if firsts is None else firsts,  # older versions did not store them
            moments,
            tensors["positions"] if facts.get("shard") else None,
        )
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
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
    facts, vectors, lines = asdict(info), np.ascontiguousarray(vectors), _json_lines(rows)
    tensors = {"vectors": vectors, "firsts": first_of_equal(vectors)}
    tensors["videos"], tensors["ends"] = _text_and_ends(lines)
    if info.shard is None:
        del facts["shard"]
    else:
        tensors["positions"] = np.array(positions, np.int64)
    if info.moments is None:
        del facts["moments"]
    else:
        parts = [vectors[:0], *(one.vectors.astype(vectors.dtype) for one in moments)]
        tensors["moment_vectors"] = np.concatenate(parts)
        tensors["moment_counts"] = np.array([len(one.rows) for one in moments], np.int64)
        tensors["moments"], tensors["moment_ends"] = _text_and_ends(_json_lines([one.rows for one in moments]))
        lines = _json_lines([{**row, "moments": one.rows} for row, one in zip(rows, moments, strict=True)])
    write_durably(folder / FILE, save(tensors, {FORMAT: json.dumps(facts)}))
    write_durably(folder / "videos.jsonl", b"".join(lines))


def _json_lines(rows: Iterable[Any]) -> list[bytes]:
    return [f"{json.dumps(row)}\n".encode() for row in rows]


def _text_and_ends(lines: Sequence[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the text of these lines, and the positions behind each."""
    return np.frombuffer(b"".join(lines), np.uint8), np.cumsum([len(line) for line in lines], dtype=np.int64)
