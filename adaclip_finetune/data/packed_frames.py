"""Packs: one LMDB file that holds the images of many videos, byte for byte as they were in their folders.

    /                what the file is (JSON)
    <video>/         a video: how many images it has, and when they are shown, if that is known (JSON)
    <video>/00001    an image, as its file was; numbers start at 1

A video is written in one transaction, so a pack holds all of a video or nothing of it, whenever writing it ended.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb
import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.frame_store import FrameError, Kind, place_and_stamp
from adaclip_finetune.data.images import ImageStore
from adaclip_finetune.data.names import canonical, split_extension
from adaclip_finetune.errors import UserError

PACK_KEY = b"/"
PACK_VALUE = json.dumps({"format": "frames of videos", "version": 2}).encode()
NOT_A_PACK = "is not a pack of frames, or was made by another version; adaclip pack makes one"
LONGEST_KEY = 500  # bytes of a video's key; LMDB takes 511, and those of its images are longer


class PackedFrames(ImageStore):
    """A frame store for a file made by `adaclip pack`. It gives the same frames as the folders that were packed.

    The store can be copied into other processes, by fork or by pickle, and used in several threads.
    """

    def __init__(self, path: Path) -> None:
        """Open the pack. Raises UserError if the file is not there or is not a pack."""
        self.path = path
        self._records: dict[str, dict[str, Any]] = {}
        self._environment: lmdb.Environment | None = None
        try:
            found = self._values("", [PACK_KEY])[0]
        except FrameError as error:
            raise UserError(f"{path}: {error.reason}") from None
        if found != PACK_VALUE:
            raise UserError(f"{path}: {NOT_A_PACK}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_environment": None}

    def count(self, video_id: str) -> int:
        return int(self._record(video_id)["images"])

    def times(self, video_id: str) -> NDArray[np.float64] | None:
        """Return when each frame is shown, in seconds (count,), if that was known of the frames that were packed."""
        times = self._record(video_id).get("times")
        return None if times is None else np.array(times, np.float64)

    def stamp(self, video_id: str) -> str:
        return f"{place_and_stamp(video_id, self.path)} {self._record(video_id)['name']}"

    def _record(self, video_id: str) -> dict[str, Any]:
        """Return what the pack says of a video, whose name may carry the extension of a video file."""
        if video_id not in self._records:
            names = [video_id, split_extension(video_id)[0]]
            found = zip(names, self._values(video_id, [video_key(name) for name in names]), strict=True)
            if (named := next(((name, value) for name, value in found if value is not None), None)) is None:
                reason = "holds no video of this name; adaclip pack adds videos to it"
                raise FrameError(video_id, self.path, reason, "missing")
            self._records[video_id] = {"name": named[0], **json.loads(named[1])}
        return self._records[video_id]

    def _images(self, video_id: str, indices: Sequence[int]) -> Iterator[tuple[Path, str, io.BytesIO]]:
        name = self._record(video_id)["name"]
        contents = self._values(video_id, [image_key(name, index) for index in indices])
        for index, content in zip(indices, contents, strict=True):
            yield self.path, f"image {index + 1} ", io.BytesIO(content or b"")

    def _values(self, video_id: str, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values of these keys, None for a key that is not there. Raises FrameError."""
        try:
            self._environment = self._environment or _open(self.path)
            with self._environment.begin() as transaction:
                return [transaction.get(key) for key in keys]
        except (lmdb.Error, OSError) as error:
            kind: Kind = "damaged" if isinstance(error, lmdb.Error) else "unreadable"
            reason = getattr(error, "strerror", None) or f"cannot be read as a pack ({error}); adaclip pack makes one"
            raise FrameError(video_id, self.path, reason, kind) from None


def video_key(name: str) -> bytes:
    """Return the key of a video's record."""
    return canonical(name).encode() + b"/"


def image_key(name: str, index: int) -> bytes:
    """Return the key of a video's image; `index` counts from 0. The images of a video follow each other in the file."""
    return video_key(name) + f"{index + 1:05d}".encode()


# LMDB refuses to open a file twice in a process, and two splits may name the same pack. A forked process may go on with
# the environment that it inherits, since that one only reads and needs no locks.
_ENVIRONMENTS: WeakValueDictionary[tuple[int, int], lmdb.Environment] = WeakValueDictionary()
_LOCK = threading.Lock()


def _open(path: Path) -> lmdb.Environment:
    """Return the only environment of this file in this process. Raises OSError and lmdb.Error."""
    facts = path.stat()
    key = (facts.st_dev, facts.st_ino)
    with _LOCK:
        environment = _ENVIRONMENTS.get(key)
        if environment is None:
            # Reading ahead stays on: the images of a video lie side by side.
            environment = lmdb.open(os.fsencode(path), subdir=False, readonly=True, create=False, lock=False)
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if facts.st_size < needed:  # LMDB maps the file into memory: reading a page that is not there is fatal
                environment.close()
                raise OSError(f"is cut off ({facts.st_size} of {needed} bytes): copy it again, or pack anew")
            _ENVIRONMENTS[key] = environment
        return environment
