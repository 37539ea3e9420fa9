"""What `index_video` found in the videos of a folder, kept from run to run in the user's cache directory.

There is one file for each folder of videos. It only saves time: where it cannot be read or written, videos are scanned
as if it were not there, and of two runs that end at once the later one's file stays.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np

from adaclip_finetune.data.video.index import FrameIndex, index_video
from adaclip_finetune.durable import write_durably

FORMAT = 4  # to be raised whenever index_video would find anything else in the same file, or packing changes

Entry = tuple[int, int, str]  # size, mtime_ns, and the packed index as text


class IndexCache:
    """The packed indices of the videos of one folder, by name relative to it, size and time of the last change."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Entry] | None = None
        self._new: dict[str, Entry] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was read: the store tells workers what they need, and they can read the file."""
        return {"_folder": self._folder, "_known": None, "_new": {}}

    def packed_index(self, path: Path) -> bytes:
        """Return the packed index of a video, which is scanned unless it is as it was at an earlier scan.

        Raises OSError and BrokenVideo.
        """
        if self._known is None:
            self._known = self._load()
        name, facts = path.relative_to(self._folder).as_posix(), path.stat()
        size, mtime_ns, packed = self._known.get(name, (0, 0, ""))
        if (size, mtime_ns) == (facts.st_size, facts.st_mtime_ns):
            return packed.encode("latin-1")
        found = pack_index(index_video(path))
        self._new[name] = facts.st_size, facts.st_mtime_ns, found.decode("latin-1")
        return found

    def save(self) -> None:
        """Write what is new, if anything is."""
        if self._new:
            with suppress(OSError, RuntimeError):
                content = gzip.compress(json.dumps(self._load() | self._new).encode(), 1)
                self._file().parent.mkdir(parents=True, exist_ok=True)
                write_durably(self._file(), content, shared=True)

    def _load(self) -> dict[str, Entry]:
        with suppress(OSError, RuntimeError, ValueError, EOFError, zlib.error):  # not there, or damaged
            known: dict[str, Entry] = json.loads(gzip.decompress(self._file().read_bytes()))
            return known
        return {}

    def _file(self) -> Path:
        """Return the file of this folder. Raises RuntimeError for a user without a home."""
        cache = Path(os.environ.get("XDG_CACHE_HOME", ""))  # XDG Base Directory Specification
        cache = cache if cache.is_absolute() else Path.home() / ".cache"
        # Another FFmpeg may see other frames in the same video.
        key = f"{FORMAT} {av.ffmpeg_version_info} {os.path.realpath(self._folder)}"
        name = hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
        return cache / "adaclip-finetune" / "videos" / f"{name}.json.gz"


def pack_index(index: FrameIndex) -> bytes:
    """Compress an index to some hundred bytes: times are nearly regular."""
    arrays = [None if each is None else np.diff(each, prepend=0).tolist() for each in (index.pts, index.keys)]
    facts = [index.tick, index.begins, index.rate, index.duration]
    return zlib.compress(json.dumps([index.num_frames, *arrays, *facts]).encode(), 9)


def unpack_index(packed: bytes) -> FrameIndex:
    """Return the index that `pack_index` was given."""
    num_frames, *arrays, tick, begins, rate, duration = json.loads(zlib.decompress(packed))
    pts, keys = (None if each is None else np.cumsum(np.array(each, np.int64)) for each in arrays)
    return FrameIndex(num_frames, pts, keys, tick, begins, rate, duration)
