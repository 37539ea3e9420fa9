"""What `index_video` found in the videos of a folder, kept from run to run in the user's cache directory.

The cache is one SQLite file, which several runs may use at once. It only saves time: where it cannot be read or
written, videos are scanned as if it were not there.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import numpy as np

from adaclip_finetune.data.video.index import FrameIndex

FORMAT = 3  # to be raised whenever index_video would find anything else in the same file, or packing changes

_TABLE = """CREATE TABLE IF NOT EXISTS videos (
    folder BLOB, name BLOB, version TEXT, size INTEGER, mtime_ns INTEGER, packed BLOB, PRIMARY KEY (folder, name)
) WITHOUT ROWID"""

Known = dict[str, tuple[int, int, bytes]]  # name → size, mtime_ns, packed index


class IndexCache:
    """The packed indices of the videos of one folder, by name relative to it, size and time of the last change."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: Known | None = None
        self._new: Known = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was read: the store tells workers what they need, and they can read the file."""
        return {"_folder": self._folder, "_known": None, "_new": {}}

    def find(self, name: str, video: os.stat_result) -> bytes | None:
        """Return the packed index of a video that is as it was when it was scanned, else None."""
        if self._known is None:
            self._known = self._load()
        *state, packed = self._known.get(name, (None, None, b""))
        if state != [video.st_size, video.st_mtime_ns]:
            return None
        try:
            unpack_index(packed)
        except (zlib.error, ValueError, IndexError):  # damage in the file
            return None
        return packed

    def add(self, name: str, video: os.stat_result, packed: bytes) -> None:
        """Remember a video; `video` is its state before it was scanned."""
        self._new[name] = video.st_size, video.st_mtime_ns, packed

    def save(self) -> None:
        """Write what is new, if anything is, and forget videos of the folder that are gone."""
        if not self._new:
            return
        folder = _key(self._folder)
        new = [(folder, os.fsencode(name), _version(), *facts) for name, facts in self._new.items()]
        gone = [(folder, os.fsencode(name)) for name in self._load() if not (self._folder / name).exists()]
        _execute("INSERT OR REPLACE INTO videos VALUES (?, ?, ?, ?, ?, ?)", new)
        _execute("DELETE FROM videos WHERE folder = ? AND name = ?", gone)

    def _load(self) -> Known:
        query = "SELECT name, size, mtime_ns, packed FROM videos WHERE folder = ? AND version = ?"
        rows = _execute(query, [(_key(self._folder), _version())])
        return {os.fsdecode(name): (size, mtime_ns, packed) for name, size, mtime_ns, packed in rows}


def pack_index(index: FrameIndex) -> bytes:
    """Compress an index to some hundred bytes: times are nearly regular, and so is the order in the file."""
    none = np.zeros(0, np.int64)
    pts, position = (none if each is None else np.diff(each, prepend=0) for each in (index.pts, index.position))
    facts = np.array([index.tick, index.begins, index.rate, index.duration])
    head = [index.num_frames, len(pts), len(position)]
    keys = np.diff(index.keys, axis=0, prepend=0).T.ravel()
    return zlib.compress(np.concatenate([head, facts.view(np.int64), pts, position, keys]).astype("<i8").tobytes(), 9)


def unpack_index(packed: bytes) -> FrameIndex:
    """Return the index that `pack_index` was given."""
    numbers = np.frombuffer(zlib.decompress(packed), "<i8").astype(np.int64)
    num_frames, num_pts, num_position = numbers[:3].tolist()
    facts, pts, position, keys = np.split(numbers[3:], np.cumsum([4, num_pts, num_position]))
    tick, begins, rate, duration = facts.view(np.float64).tolist()
    return FrameIndex(
        num_frames,
        np.cumsum(pts) if num_pts else None,
        np.cumsum(position) if num_position else None,
        np.cumsum(keys.reshape(3, -1), axis=1).T,
        tick,
        begins,
        rate,
        duration,
    )


def _execute(statement: str, parameters: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Execute a statement with each of the parameters in one transaction, and return the rows that it gives.

    Return [] where there can be no cache, and delete a damaged file.
    """
    path = None
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME", ""))  # XDG Base Directory Specification
        path = (cache if cache.is_absolute() else Path.home() / ".cache") / "adaclip-finetune" / "videos.sqlite"
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path)) as database, database:
            database.execute(_TABLE)
            return [row for given in parameters for row in database.execute(statement, given)]
    except (OSError, RuntimeError, sqlite3.Error) as error:  # RuntimeError: a user without a home
        if path is not None and type(error) is sqlite3.DatabaseError:  # not a database, or a damaged one
            path.unlink(missing_ok=True)
        return []


def _key(folder: Path) -> bytes:
    return os.fsencode(os.path.realpath(folder))


def _version() -> str:
    """Return what an index depends on beside the video: another FFmpeg may see other frames."""
    return f"{FORMAT}, FFmpeg {av.ffmpeg_version_info}"
