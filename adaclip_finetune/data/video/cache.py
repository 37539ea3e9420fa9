"""Frame counts and key frames of the videos of a folder, kept from run to run in the user's cache directory.

One file a folder of videos, which holds what `index_video` found, by name, size and time of the video's last change.
The cache only saves time: where it cannot be read or written, or was cut or altered, videos are scanned as if it were
not there. Several runs may use it at once: each writes a whole file, with what it found there, and the last one stays.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.video.index import KeyFrame, VideoIndex
from adaclip_finetune.durable import write_durably

FORMAT = 2  # to be raised whenever index_video would tell anything else of the same file, or this file is laid out anew

_CHECKSUM = 16  # bytes
_RECORD = struct.Struct("<HIQq")  # bytes of name, bytes of index, size of the video, its time of change in nanoseconds


class IndexCache:
    """What is known of the videos of one folder: names are relative to it, indices as `pack_index` gives them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, _Record] | None = None  # what the file held
        self._new: dict[str, _Record] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A worker is told by the store what it needs, and can read the file."""
        return {"folder": self.folder, "_known": None, "_new": {}}

    def find(self, name: str, video: os.stat_result) -> bytes | None:
        """The index of a video that is as it was when it was scanned; else None."""
        if self._known is None:
            self._known = _load(self._path())
        record = self._new.get(name) or self._known.get(name)
        return record.packed if record and record[:2] == (video.st_size, video.st_mtime_ns) else None

    def add(self, name: str, video: os.stat_result, packed: bytes) -> None:
        """Remember a video; `video` tells what it was like before it was scanned."""
        self._new[name] = _Record(video.st_size, video.st_mtime_ns, packed)

    def save(self) -> None:
        """Add what is new to the file, if anything is, and drop the videos that are gone. Nothing is lost but time
        where that is not possible."""
        path = self._path()
        if not self._new or not path:
            return
        stored = _load(path)  # by now another run may have added to it
        if self._new.items() <= stored.items():  # the other processes of this run found the same
            return
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        with suppress(OSError):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_durably(beside, _dump(self._present(stored | self._new)))
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)

    def _present(self, records: Mapping[str, _Record]) -> dict[str, _Record]:
        """Those of videos that are still there. Folders are listed, because asking for each of a million takes long."""
        listings: dict[str, set[str] | None] = {}
        present = {}
        for name, record in records.items():
            folder, _, file = name.rpartition("/")
            if folder not in listings:
                listings[folder] = _listing(self.folder / folder)
            listing = listings[folder]
            if listing is None or file in listing:
                present[name] = record
        return present

    def _path(self) -> Path | None:
        folder = _cache_folder()
        name = hashlib.sha256(os.fsencode(os.path.realpath(self.folder))).hexdigest()[:32]
        return folder / "video-index" / name if folder else None


def _listing(folder: Path) -> set[str] | None:
    """None if it cannot be told what is there."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError:
        return None


class _Record(NamedTuple):
    size: int  # bytes
    changed: int  # nanoseconds
    packed: bytes


def pack_index(index: VideoIndex) -> bytes:
    """Some hundred bytes a video: times of frames are nearly regular, and so is their order in the file."""
    times, kind = (index.pts, 2) if index.pts is not None else (index.shown, 1)
    if times is None:
        times, kind = np.zeros(0, np.int64), 0
    position = np.zeros(0, np.int64) if index.position is None else index.position
    keys = np.array([(key.position, key.pts, key.dts) for key in index.keys], np.int64).reshape(-1, 3)
    numbers = np.concatenate(
        [
            [index.num_frames, kind, len(keys)],
            np.diff(times, prepend=0),
            position - np.arange(len(position)),
            np.diff(keys, axis=0, prepend=0).T.ravel(),
        ]
    )
    zigzag = (numbers << 1) ^ (numbers >> 63)  # small numbers of both signs have small bytes in the same places
    return zlib.compress(_by_place(zigzag.astype("<i8").view(np.uint8), len(zigzag), 8), 9)


def unpack_index(packed: bytes) -> VideoIndex:
    """What `pack_index` was given."""
    content = np.frombuffer(zlib.decompress(packed), np.uint8)
    zigzag = np.frombuffer(_by_place(content, 8, len(content) // 8), "<u8")
    numbers = (zigzag >> np.uint64(1)).astype(np.int64) ^ -(zigzag & np.uint64(1)).astype(np.int64)
    num_frames, kind, num_keys = numbers[:3].tolist()
    if kind == 0:
        return VideoIndex(num_frames)
    deltas, moves, keys = np.split(numbers[3:], [num_frames, 2 * num_frames])
    times = np.cumsum(deltas)
    if kind == 1:
        return VideoIndex(num_frames, shown=times)
    return VideoIndex(
        num_frames,
        times,
        moves + np.arange(num_frames),
        tuple(KeyFrame(*key) for key in np.cumsum(keys.reshape(3, num_keys), axis=1).T.tolist()),
    )


def _by_place(content: NDArray[np.uint8], rows: int, columns: int) -> bytes:
    """Transpose: all lowest bytes first, then all second ones, or back."""
    return content.reshape(rows, columns).T.tobytes()


def _cache_folder() -> Path | None:
    """As the XDG Base Directory Specification has it. None for a user without a home."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given / "adaclip-finetune"
    try:
        return Path.home() / ".cache" / "adaclip-finetune"
    except RuntimeError:
        return None


def _head() -> bytes:
    """What such a file begins with; another FFmpeg may see other frames."""
    return f"adaclip video index {FORMAT}, FFmpeg {av.ffmpeg_version_info}\n".encode()


def _dump(records: Mapping[str, _Record]) -> bytes:
    parts = []
    for name, record in records.items():
        raw = os.fsencode(name)
        parts += [_RECORD.pack(len(raw), len(record.packed), record.size, record.changed), raw, record.packed]
    body = b"".join(parts)
    return _head() + _checksum(body) + body


def _load(path: Path | None) -> dict[str, _Record]:
    """Empty if there is no such file, or it is not, to the last byte, what `_dump` gave under this version."""
    head = _head()
    try:
        content = path.read_bytes() if path else b""
    except OSError:
        return {}
    at = len(head) + _CHECKSUM
    if not content.startswith(head) or content[len(head) : at] != _checksum(content[at:]):
        return {}
    records = {}
    while at < len(content):
        name_bytes, packed_bytes, size, changed = _RECORD.unpack_from(content, at)
        start = at + _RECORD.size + name_bytes
        at = start + packed_bytes
        records[os.fsdecode(content[start - name_bytes : start])] = _Record(size, changed, content[start:at])
    return records


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM).digest()
