"""Reading and writing the files of an index folder.

    index.json           an `IndexInfo`, the SHA-256 of the three files below, and a random version
    vectors.safetensors  `vectors` (V, D), rows of length 1, float32 or float16
    videos.jsonl         one JSON object per row: the video, its file, and the frames that its vector was made of
    faiss.index          the FAISS graph of an index of kind hnsw
    thumbs/              one JPEG per row
    parts/               batches of vectors that are finished but not in the index yet
    .adaclip-index       marks the folder as an index before index.json exists

A new index is written into `next/`, which appears whole or not at all, and its files are then moved into place.
Readers look into `next/` first, so they find files that belong together even if the writer was killed halfway.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors.numpy import load, save

from adaclip_finetune.durable import flush_folder, write_durably
from adaclip_finetune.errors import UserError

FORMAT = "adaclip-index/2"
THUMBS, PARTS, MARK = "thumbs", "parts", ".adaclip-index"

_INFO, _VECTORS, _VIDEOS, _GRAPH = "index.json", "vectors.safetensors", "videos.jsonl", "faiss.index"
_NEXT, _UNFINISHED = "next", ".next.part"
_ATTEMPTS = 50  # to read an index that is being rewritten meanwhile
_REMAKE = "delete the folder and index the videos again"

Vectors = NDArray[Any]
"""Rows (V, D), float32 or float16."""


@dataclass(frozen=True)
class Recall:
    """The share of the true nearest videos that an approximate index still finds, and how it was measured."""

    share: float  # 0…1, of the 10 nearest
    by: str  # which search found the true nearest ones, in words
    asked: str  # which queries were asked, in words
    videos: int  # how many videos the index had


@dataclass(frozen=True)
class IndexInfo:
    """What an index was made of and how."""

    fingerprint: str  # of the model
    run: str  # absolute path of the run folder or checkpoint
    settings: dict[str, Any]  # settings that are needed beside the run to load the model, such as clip_weights
    source: str  # absolute path of the folder or annotation that was indexed
    root: str  # absolute path of the folder that holds the video files
    kind: Literal["flat", "hnsw"]
    dtype: Literal["float32", "float16"]
    made: str  # ISO 8601
    changed: str  # ISO 8601
    recall: Recall | None = None  # None: the index is exact, or too small to miss anything


class EmbeddedVideo(NamedTuple):
    """A row of videos.jsonl and its vector (D,)."""

    row: dict[str, Any]
    vector: Vectors


@dataclass(frozen=True)
class StoredIndex:
    """The content of an index folder. `lines` are those of videos.jsonl; `graph` is None for the kind flat, and where
    the file is missing or damaged. `version` is different whenever the folder was written again."""

    info: IndexInfo
    vectors: Vectors
    lines: list[bytes]
    graph: bytes | None
    version: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return all rows of videos.jsonl, parsed."""
        return [json.loads(line) for line in self.lines]

    def videos(self) -> list[EmbeddedVideo]:
        """Return all rows with their vectors."""
        return list(map(EmbeddedVideo, self.rows, self.vectors))


def is_index(folder: Path) -> bool:
    """Return whether the folder holds a finished index."""
    return (folder / _NEXT / _INFO).is_file() or (folder / _INFO).is_file()


def version_of(folder: Path) -> str:
    """Return the version of the index that is in the folder now, or "" if there is none."""
    try:
        return _sha256(_read_bytes(folder, _INFO))
    except UserError:
        return ""


def read_index(folder: Path) -> StoredIndex:
    """Read an index. Raise UserError if the folder is none, has another format, or was altered."""
    if not is_index(folder):
        raise UserError(f"{folder}: {_why_no_index(folder)}")
    for _ in range(_ATTEMPTS):
        content = _read_bytes(folder, _INFO)
        try:
            return _read_files(folder, content)
        except UserError:
            if version_of(folder) == _sha256(content):
                raise
    raise UserError(f"{folder}: is being rewritten all the time; try again when `adaclip index` has finished")


def write_index(
    folder: Path, info: IndexInfo, vectors: Vectors, rows: Sequence[Mapping[str, Any]], graph: bytes | None = None
) -> None:
    """Replace the index in the folder, all files at once. Vectors (V, D) are stored as `info.dtype`. Raise UserError if
    that fails; the index that was there is then untouched."""
    vectors = np.ascontiguousarray(vectors, info.dtype)
    files = {_VECTORS: save({"vectors": vectors}), _VIDEOS: "".join(f"{json.dumps(row)}\n" for row in rows).encode()}
    if graph is not None:
        files[_GRAPH] = graph
    content = {"format": FORMAT, **asdict(info), "count": len(vectors), "width": vectors.shape[1]}
    content["sha256"] = {"vectors": digest_of(vectors), "videos": _sha256(files[_VIDEOS])}
    content["sha256"] |= {} if graph is None else {"graph": _sha256(graph)}
    files[_INFO] = json.dumps(content | {"version": secrets.token_hex(8)}, indent=1).encode()
    try:
        finish_move(folder)
        (folder / MARK).touch()
        shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)
        (folder / _UNFINISHED).mkdir()
        for name, file in files.items():
            write_durably(folder / _UNFINISHED / name, file)
        (folder / _UNFINISHED).rename(folder / _NEXT)
        flush_folder(folder)
        finish_move(folder)
        if graph is None:
            (folder / _GRAPH).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: could not be written ({error}); the index that was there is untouched") from error


def finish_move(folder: Path) -> None:
    """Move the files in `next/`, which a killed writer may have left, into place. Only the holder of the folder's lock
    may call this. Raise OSError."""
    if not (folder / _NEXT).is_dir():
        return
    for name in (_VECTORS, _VIDEOS, _GRAPH, _INFO):
        if (folder / _NEXT / name).exists():
            (folder / _NEXT / name).replace(folder / name)
    flush_folder(folder)
    (folder / _NEXT).rmdir()


def read_parts(folder: Path, of: str) -> Iterator[EmbeddedVideo]:
    """Yield the videos of finished batches that were written for the same `of`; damaged files are ignored."""
    for path in sorted((folder / PARTS).glob("*.safetensors")):
        with suppress(OSError, ValueError, KeyError, safetensors.SafetensorError):
            with safetensors.safe_open(path, framework="np") as file:
                metadata, vectors = file.metadata() or {}, file.get_tensor("vectors")
            if metadata["of"] == of:
                yield from map(EmbeddedVideo, json.loads(metadata["videos"]), vectors)


def write_part(folder: Path, of: str, batch: Sequence[EmbeddedVideo]) -> None:
    """Keep a finished batch. `of` says which model and videos it belongs to. Raise OSError."""
    (folder / PARTS).mkdir(exist_ok=True)
    number = len(list((folder / PARTS).glob("*.safetensors")))
    vectors, rows = np.stack([video.vector for video in batch]), json.dumps([video.row for video in batch])
    content = save({"vectors": vectors}, {"of": of, "videos": rows})
    write_durably(folder / PARTS / f"{number:06d}.safetensors", content)


def digest_of(vectors: Vectors) -> str:
    """Return the SHA-256 of type, shape and values."""
    digest = hashlib.sha256(f"{vectors.dtype} {vectors.shape}".encode())
    digest.update(np.ascontiguousarray(vectors).data)
    return digest.hexdigest()


def _why_no_index(folder: Path) -> str:
    if not folder.exists():
        return f"there is no such folder; `adaclip index RUN VIDEOS -o {folder}` makes one"
    if (folder / MARK).exists():
        return f"is not finished ({_INFO} not found); `adaclip index … -o {folder}` continues it"
    return f"is not an index ({_INFO} not found); give the folder that `adaclip index -o` made"


def _read_files(folder: Path, content: bytes) -> StoredIndex:
    """Read what belongs to the index.json with this content."""
    try:
        facts = json.loads(content)
        if facts["format"] != FORMAT:
            reads = f"this version reads {FORMAT}"
            raise UserError(f"{folder / _INFO}: has the format {facts['format']!r}, but {reads}: {_REMAKE}")
        info, expected = TypeAdapter(IndexInfo).validate_python(facts), dict(facts["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / _INFO}: is damaged ({error}): {_REMAKE}") from error
    videos, stored = _read_bytes(folder, _VIDEOS), _read_bytes(folder, _VECTORS)
    try:
        vectors: Vectors = load(stored)["vectors"]
    except (KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder / _VECTORS}: cannot be read as safetensors ({error}): {_REMAKE}") from error
    for name, key, digest in ((_VECTORS, "vectors", digest_of(vectors)), (_VIDEOS, "videos", _sha256(videos))):
        if expected.get(key) != digest:
            raise UserError(f"{folder}: {name} was altered after it was written: {_REMAKE}")
    graph = _read_graph(folder, expected.get("graph"))
    return StoredIndex(info, vectors, videos.splitlines(), graph, _sha256(content))


def _read_graph(folder: Path, digest: str | None) -> bytes | None:
    """FAISS does not check what it reads, so it is only given the bytes that were written."""
    with suppress(UserError):
        if digest and _sha256(content := _read_bytes(folder, _GRAPH)) == digest:
            return content
    return None


def _read_bytes(folder: Path, name: str) -> bytes:
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            return (folder / _NEXT / name).read_bytes()
        return (folder / name).read_bytes()
    except OSError as error:
        raise UserError(f"{folder / name}: cannot be read ({error.strerror}): {_REMAKE}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
