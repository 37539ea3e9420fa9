"""What a `NAME.index` folder holds, read and written.

    index.json           what it is: format, model, source, count, width, dtype, kind
    vectors.safetensors  `vectors` (V, D), L2-normalised rows, float32 or float16: the truth
    videos.jsonl         a line a row: the video, its file, and the frames that its vector was made of
    thumbs/              a picture a row
    .adaclip-index       that the folder is one, from before it is finished
    faiss.index          of kind hnsw: made from the vectors, and made anew where it is missing or of other vectors

The three files are written together in `next/`, which appears whole or not at all, and then move to their places. So
whoever reads, whenever somebody was killed, finds files that belong together: those in `next/` come first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save

from adaclip_finetune.durable import flush_folder, write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import parse_json, read_json

FORMAT = "adaclip-index/1"
THUMBS, MARK = "thumbs", ".adaclip-index"

_ABOUT, _VECTORS, _VIDEOS = "index.json", "vectors.safetensors", "videos.jsonl"
_NEXT, _UNFINISHED = "next", ".next.part"
_DTYPES = {"float32": np.float32, "float16": np.float16}

Rows = NDArray[Any]
"""Vectors (V, D), float32 or float16."""


@dataclass(frozen=True)
class About:
    """index.json: where the model and the videos lie, and what the vectors are."""

    fingerprint: str  # of the model
    run: str  # a run folder or a checkpoint, absolute
    settings: dict[str, Any]  # what was given beside the run to load it: clip_weights, say
    source: str  # the folder or annotation that was indexed, absolute
    root: str  # the folder that the videos' files lie in, absolute
    kind: str  # flat or hnsw
    dtype: str  # float32 or float16
    made: str  # ISO 8601
    changed: str


@dataclass(frozen=True)
class StoredIndex:
    """All of it but the pictures. `digest` is that of the vectors' bytes."""

    about: About
    vectors: Rows
    videos: list[dict[str, Any]]
    digest: str


def is_index(folder: Path) -> bool:
    """Whether there is one that can be read."""
    return _place(folder, _ABOUT).is_file()


def read_index(folder: Path) -> StoredIndex:
    """Raises UserError where it is no index, is of another version, or was altered."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; `adaclip index RUN VIDEOS -o {folder}` makes one")
    if not is_index(folder):
        raise UserError(f"{folder}: is no finished index (it holds no {_ABOUT}); `adaclip index … -o {folder}` goes on")
    content = read_json(_place(folder, _ABOUT))
    where = folder / _ABOUT
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise UserError(f"{where}: has the format {found!r}; this version of adaclip reads {FORMAT}. Make it anew")
    about = _about(where, content)
    lines = _read_bytes(folder, _VIDEOS)
    vectors, belongs_to = _read_vectors(folder, about.dtype)
    if belongs_to != _sha256(lines):
        raise UserError(f"{folder}: {_VECTORS} and {_VIDEOS} do not belong together; one of them was altered")
    videos = [parse_json(line, f"{folder / _VIDEOS}, line {n}") for n, line in enumerate(_lines(lines), 1)]
    if len(videos) != len(vectors):
        raise UserError(f"{folder}: {_VECTORS} has {len(vectors)} rows, {_VIDEOS} {len(videos)}; make it anew")
    return StoredIndex(about, vectors, videos, vectors_digest(vectors))


def write_index(folder: Path, about: About, vectors: Rows, videos: Sequence[Mapping[str, Any]]) -> None:
    """Replace what is there by this, at once. Vectors (V, D) are stored as `about.dtype`. Raises UserError."""
    lines = "".join(f"{json.dumps(video)}\n" for video in videos).encode()
    rows = np.ascontiguousarray(vectors, _DTYPES[about.dtype])
    content = {"format": FORMAT, **asdict(about), "count": len(rows), "width": rows.shape[1]}
    unfinished = folder / _UNFINISHED
    try:
        finish_move(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        write_durably(unfinished / _VECTORS, save({"vectors": rows}, {"format": FORMAT, "videos": _sha256(lines)}))
        write_durably(unfinished / _VIDEOS, lines)
        write_durably(unfinished / _ABOUT, json.dumps(content, indent=1).encode())
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


def vectors_digest(vectors: Rows) -> str:
    """SHA-256 over type, shape and values: by which an index of FAISS knows its vectors."""
    digest = hashlib.sha256(f"{vectors.dtype} {vectors.shape}".encode())
    digest.update(np.ascontiguousarray(vectors).data)
    return digest.hexdigest()


def _about(where: Path, content: dict[str, Any]) -> About:
    texts = ("fingerprint", "run", "source", "root", "kind", "dtype", "made", "changed")
    wrong = [name for name in texts if not isinstance(content.get(name), str)]
    if wrong or not isinstance(content.get("settings"), dict):
        raise UserError(f"{where}: {', '.join(wrong) or 'settings'} is missing or of another type; make it anew")
    if content["kind"] not in ("flat", "hnsw") or content["dtype"] not in _DTYPES:
        raise UserError(f"{where}: kind {content['kind']!r} or dtype {content['dtype']!r} is not known here")
    return About(**{name: content[name] for name in (*texts, "settings")})


def _read_vectors(folder: Path, dtype: str) -> tuple[Rows, str]:
    """The vectors, and the digest of the lines that belong to them."""
    path = _place(folder, _VECTORS)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            vectors, belongs_to = file.get_tensor("vectors"), (file.metadata() or {}).get("videos", "")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); make the index anew") from error
    if vectors.ndim != 2 or vectors.dtype != _DTYPES[dtype]:
        raise UserError(f"{path}: holds {vectors.dtype} {vectors.shape}, not {dtype} (V, D); make the index anew")
    return vectors, belongs_to


def _read_bytes(folder: Path, name: str) -> bytes:
    path = _place(folder, name)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make the index anew") from error


def _place(folder: Path, name: str) -> Path:
    """Where the file is now: in `next/`, should whoever moved it have been killed."""
    staged = folder / _NEXT / name
    return staged if staged.exists() else folder / name


def _lines(content: bytes) -> list[str]:
    return content.decode("ascii", "replace").splitlines()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
