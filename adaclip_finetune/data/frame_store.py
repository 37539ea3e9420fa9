"""What a store of frames is, and what it raises.

A store holds paths and what it has learned about the videos, no open files: it can be copied into worker processes,
by fork or by pickle, and used in several threads. Whatever cannot be read is a FrameError; nothing is made up.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.video.decoding import Stopped, never

Scan = Iterator[tuple[int, NDArray[np.uint8]]]  # frames with their indices
Kind = Literal[
    "missing",  # the video is not there
    "gap",  # an image is not there, though one behind it is
    "sizes",  # frames differ in size
    "damaged",  # what is there has gone bad
    "unreadable",  # what else may be
]


class FrameError(Exception):
    """A video, or one of its frames, that cannot be read: which, where, and why; and what kind of reason that is."""

    def __init__(self, video_id: str, path: str | Path, reason: str, kind: Kind = "unreadable") -> None:
        super().__init__(video_id, path, reason, kind)
        self.video_id, self.path, self.reason, self.kind = video_id, path, reason, kind

    def __str__(self) -> str:
        return f"{self.video_id}: {self.path}: {self.reason}"


class FrameStore(Protocol):
    """Frames by video and index; all methods raise FrameError."""

    def count(self, video_id: str) -> int:
        """How many frames the video has, at least 1. Cheap when asked again."""
        ...

    def read(self, video_id: str, indices: Sequence[int]) -> NDArray[np.uint8]:
        """The frames with these indices, from 0, in any order and repeated at will: RGB (n, H, W, 3)."""
        ...

    def scan(self, video_id: str, stopped: Stopped = never) -> Scan:
        """Every frame with its index, in order, RGB (H, W, 3), a frame at a time in memory; a video file is decoded
        once. It ends early when `stopped` says so, and at the first frame that cannot be read, which raises."""
        ...


def unlisted(video_id: str, folder: Path, error: OSError) -> FrameError:
    """Of a folder that the system does not list."""
    kind: Kind = "missing" if error.errno == errno.ENOENT else "unreadable"
    return FrameError(video_id, folder, error.strerror or str(error), kind)
