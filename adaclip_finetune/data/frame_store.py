"""The interface of frame stores, and the error that they raise.

A store holds paths and what it has learned about the videos, but no open files: it can be copied into worker processes,
by fork or by pickle, and used in several threads. Whatever cannot be read is a FrameError; nothing is made up.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.video.decoding import Stopped, never
from adaclip_finetune.data.video.remote import RemotePath

Frames = NDArray[np.uint8] | list[NDArray[np.uint8]]  # RGB (n, H, W, 3); where sizes differ, n arrays (H, W, 3)
Scan = Iterator[tuple[int, NDArray[np.uint8]]]  # frames with their indices
Kind = Literal[
    "missing",  # the video is not there
    "gap",  # an image is not there, though a later one is
    "sizes",  # images of a folder differ in size
    "damaged",  # the content of a file is damaged
    "unreadable",  # any other reason
]


class FrameError(Exception):
    """A video, or one of its frames, that cannot be read: its name, its file or folder, the reason and its kind."""

    def __init__(self, video_id: str, path: str | PurePath, reason: str, kind: Kind = "unreadable") -> None:
        super().__init__(video_id, path, reason, kind)
        self.video_id, self.path, self.reason, self.kind = video_id, path, reason, kind

    def __str__(self) -> str:
        return f"{self.video_id}: {self.path}: {self.reason}"


class FrameStore(Protocol):
    """Frames by video and index. All methods raise FrameError."""

    def count(self, video_id: str) -> int:
        """Return how many frames the video has, at least 1. Cheap when asked again."""
        ...

    def times(self, video_id: str) -> NDArray[np.float64] | None:
        """Return when each frame is shown, in seconds (count,), ascending; None if the rate is constant or unknown."""
        ...

    def stamp(self, video_id: str) -> str:
        """Return where the video is, with the size and the time of change of its files: it changes when they do."""
        ...

    def read(self, video_id: str, indices: Sequence[int]) -> Frames:
        """Return the frames with these indices, from 0, in any order and repeated at will."""
        ...

    def scan(self, video_id: str, stopped: Stopped = never) -> Scan:
        """Give every frame with its index, in order, with one frame in memory at a time.

        A video file is decoded once. The scan ends early when `stopped` returns True, and raises at the first frame
        that cannot be read.
        """
        ...


class FileStamp(NamedTuple):
    """Size and time of change of a video, by which a change is noticed.

    For a folder of frames, `size` is the sum over its files, and `mtime_ns` the latest change of one of them or of the
    folder itself, which changes when a file is added, removed or renamed.
    """

    size: int  # bytes
    mtime_ns: int


def stamp_of(path: Path | RemotePath) -> FileStamp:
    """Return the stamp that a file or a folder of frames has now. Raise OSError."""
    found = path.stat()
    if isinstance(path, RemotePath) or not path.is_dir():
        return FileStamp(found.st_size, found.st_mtime_ns)
    with os.scandir(path) as entries:
        images = [entry.stat() for entry in entries]
    return FileStamp(sum(one.st_size for one in images), max(one.st_mtime_ns for one in (found, *images)))


def place_and_stamp(video_id: str, path: Path | RemotePath) -> str:
    """Return where a file or a folder of frames is, and its stamp, as `FrameStore.stamp` does. Raise FrameError.

    It notices more than `stamp_of`: a frame that is replaced by an older one of the same size, too.
    """
    try:
        files = sorted(path.iterdir()) if isinstance(path, Path) and path.is_dir() else [path]
        facts = [(file.name, found.st_size, found.st_mtime_ns) for file in files for found in [file.stat()]]
    except OSError as error:
        raise FrameError(video_id, str(path), error.strerror or str(error), "missing") from error
    return f"{path.absolute() if isinstance(path, Path) else path} {facts}"


def unlisted(video_id: str, folder: Path, error: OSError) -> FrameError:
    """Return the error for a folder that the system cannot list."""
    kind: Kind = "missing" if error.errno == errno.ENOENT else "unreadable"
    return FrameError(video_id, folder, error.strerror or str(error), kind)
