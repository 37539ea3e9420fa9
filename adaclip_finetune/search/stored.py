"""What a `NAME.index` folder holds, read and written.

    index.json           what it is: format, model, source, count, width, dtype, kind, and the digests of the next two
    vectors.safetensors  `vectors` (V, D), L2-normalised rows, float32 or float16: the truth
    videos.jsonl         a line a row: the video, its file, and the frames that its vector was made of
    thumbs/              a picture a row
    .adaclip-index       that the folder is one, from before it is finished
    faiss.index          of kind hnsw: made from the vectors, and made anew where it is missing or of other vectors

The three files are written together in `next/`, which appears whole or not at all, and then move to their places. So
whoever reads, whenever somebody was killed, finds files that belong together: those in `next/` come first. Whoever
reads while they change finds that the digests disagree, and reads again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save

from adaclip_finetune.durable import flush_folder, write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.about import FORMAT, REMAKE, About, Digests, about_of_json, about_to_json
from adaclip_finetune.search.json_lines import JsonLines

THUMBS, MARK = "thumbs", ".adaclip-index"

_ABOUT, _VECTORS, _VIDEOS = "index.json", "vectors.safetensors", "videos.jsonl"
_NEXT, _UNFINISHED = "next", ".next.part"
_ATTEMPTS = 50  # to read what is being rewritten meanwhile

Rows = NDArray[Any]
"""Vectors (V, D), float32 or float16."""

T = TypeVar("T")


@dataclass(frozen=True)
class StoredIndex:
    """All of it but the pictures. `digest` is that of the vectors, `version` tells this index from what is written to
    its folder later."""

    about: About
    vectors: Rows
    lines: JsonLines
    digest: str
    version: str

    @property
    def videos(self) -> list[dict[str, Any]]:
        """All lines, parsed."""
        return list(self.lines)


def is_index(folder: Path) -> bool:
    """Whether there is one that can be read."""
    return (folder / _NEXT / _ABOUT).is_file() or (folder / _ABOUT).is_file()


def version_of(folder: Path) -> str:
    """The version that is in the folder now; empty if there is none, or it cannot be read."""
    try:
        return _version(_from(folder, _ABOUT, Path.read_bytes))
    except OSError:
        return ""


def read_index(folder: Path) -> StoredIndex:
    """Raises UserError where it is no index, is of another version, or was altered."""
    if not is_index(folder):
        raise UserError(f"{folder}: {_why_none(folder)}")
    for _ in range(_ATTEMPTS):
        content = _read_bytes(folder, _ABOUT)
        try:
            return _read(folder, content)
        except UserError:
            if version_of(folder) == _version(content):
                raise
    raise UserError(f"{folder}: is being rewritten without a pause; try again when `adaclip index` is done")


def write_index(folder: Path, about: About, vectors: Rows, videos: Sequence[Mapping[str, Any]]) -> None:
    """Replace what is there by this, at once. Vectors (V, D) are stored as `about.dtype`. Raises UserError."""
    lines = "".join(f"{json.dumps(video)}\n" for video in videos).encode()
    rows = np.ascontiguousarray(vectors, about.dtype)
    digests = Digests(digest_of(rows), _sha256(lines))
    unfinished = folder / _UNFINISHED
    try:
        finish_move(folder)
        (folder / MARK).touch()
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        write_durably(unfinished / _VECTORS, save({"vectors": rows}, {"format": FORMAT}))
        write_durably(unfinished / _VIDEOS, lines)
        write_durably(unfinished / _ABOUT, about_to_json(about, digests, rows.shape))
        unfinished.rename(folder / _NEXT)
        flush_folder(folder)
        finish_move(folder)
    except OSError as error:
        raise UserError(f"{folder}: could not be written ({error}); what was there before is untouched") from error


def finish_move(folder: Path) -> None:
    """Bring what a killed writer left in `next/` to its place; to be called by who holds the lock. Raises OSError."""
    if not (folder / _NEXT).is_dir():
        return
    for name in (_VECTORS, _VIDEOS, _ABOUT):
        if (folder / _NEXT / name).exists():
            (folder / _NEXT / name).replace(folder / name)
    flush_folder(folder)
    (folder / _NEXT).rmdir()


def digest_of(vectors: Rows) -> str:
    """SHA-256 over type, shape and values: by which an index of FAISS knows its vectors."""
    digest = hashlib.sha256(f"{vectors.dtype} {vectors.shape}".encode())
    digest.update(np.ascontiguousarray(vectors).data)
    return digest.hexdigest()


def _why_none(folder: Path) -> str:
    if not folder.exists():
        return f"there is no such folder; `adaclip index RUN VIDEOS -o {folder}` makes one"
    if (folder / MARK).exists():
        return f"is no finished index (it holds no {_ABOUT}); `adaclip index … -o {folder}` goes on"
    return f"is no index (it holds no {_ABOUT}); give the folder that `adaclip index -o` made"


def _read(folder: Path, content: bytes) -> StoredIndex:
    """What index.json, whose content this is, belongs to."""
    about, digests = about_of_json(content, folder / _ABOUT)
    lines, vectors = _read_bytes(folder, _VIDEOS), _read_vectors(folder, about.dtype)
    found = Digests(digest_of(vectors), _sha256(lines))
    if found != digests:
        altered = " and ".join(name for name, a, b in zip((_VECTORS, _VIDEOS), found, digests, strict=True) if a != b)
        raise UserError(f"{folder}: something has altered {altered}: {REMAKE}")
    videos = JsonLines(lines, folder / _VIDEOS)
    if len(videos) != len(vectors):
        raise UserError(f"{folder}: {_VECTORS} has {len(vectors)} rows, {_VIDEOS} {len(videos)}: {REMAKE}")
    return StoredIndex(about, vectors, videos, digests.vectors, _version(content))


def _read_vectors(folder: Path, dtype: str) -> Rows:
    try:
        vectors = _from(folder, _VECTORS, _tensor)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder / _VECTORS}: cannot be read as safetensors ({error}): {REMAKE}") from error
    if vectors.ndim != 2 or vectors.dtype != dtype:
        raise UserError(f"{folder / _VECTORS}: holds {vectors.dtype} {vectors.shape}, not {dtype} (V, D): {REMAKE}")
    return vectors


def _tensor(path: Path) -> Rows:
    with safetensors.safe_open(path, framework="np") as file:
        return file.get_tensor("vectors")  # type: ignore[no-any-return]


def _read_bytes(folder: Path, name: str) -> bytes:
    try:
        return _from(folder, name, Path.read_bytes)
    except FileNotFoundError as error:
        raise UserError(f"{folder / name}: is missing: {REMAKE}") from error
    except OSError as error:
        raise UserError(f"{folder / name}: cannot be read ({error.strerror})") from error


def _from(folder: Path, name: str, read: Callable[[Path], T]) -> T:
    """From `next/`, where it is until it has moved to its place."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return read(folder / _NEXT / name)
    return read(folder / name)


def _version(content: bytes) -> str:
    """Of an index.json."""
    return _sha256(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
