"""Frames of video files, read in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.extensions import VIDEO_EXTENSIONS
from adaclip_finetune.data.frame_store import FrameError, Scan, unlisted
from adaclip_finetune.data.video.cache import IndexCache, pack_index, unpack_index
from adaclip_finetune.data.video.container import BrokenVideo
from adaclip_finetune.data.video.decoding import Stopped, never
from adaclip_finetune.data.video.file import read_frames, scan_frames
from adaclip_finetune.data.video.index import VideoIndex, index_video
from adaclip_finetune.data.video.times import Times, video_times


class VideoFolder:
    """`folder/<video>.mp4` and the like, read in place. `extensions` chooses where a video has several files.

    Each file is scanned for its frames when it is first asked for, unless an earlier run did and called `remember`.
    """

    def __init__(self, folder: Path, extensions: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.extensions = dict(extensions or {})
        self._listings: dict[Path, dict[str, list[str]]] = {}
        self._indices: dict[str, bytes] = {}  # packed: a hundred bytes for each of perhaps a million
        self._cache = IndexCache(folder)

    def count(self, video_id: str) -> int:
        return self._index(video_id).num_frames

    def read(self, video_id: str, indices: Sequence[int]) -> NDArray[np.uint8]:
        path, index = self.find(video_id), self._index(video_id)
        try:
            return read_frames(path, index, indices)
        except BrokenVideo as error:
            raise FrameError(video_id, path, str(error), error.kind) from None

    def scan(self, video_id: str, stopped: Stopped = never) -> Scan:
        path, index = self.find(video_id), self._index(video_id)
        try:
            yield from scan_frames(path, index, stopped)
        except BrokenVideo as error:
            raise FrameError(video_id, path, str(error), error.kind) from None

    def times(self, video_id: str, frames: Sequence[int]) -> Times:
        """How long the video is, and when a player shows these frames. Raises FrameError."""
        path, index = self.find(video_id), self._index(video_id)
        try:
            return video_times(path, index, frames)
        except BrokenVideo as error:
            raise FrameError(video_id, path, str(error), error.kind) from None

    def remember(self) -> None:
        """Keep what was scanned for later runs."""
        self._cache.save()

    def find(self, video_id: str) -> Path:
        """The file of a video: its name is the id and one of the known extensions, in any case."""
        path = self.folder / video_id
        extension = self.extensions.get(video_id)
        names = [
            name
            for name in self._listing(video_id, path.parent).get(path.name, [])
            if extension is None or name.lower().endswith(f".{extension}")
        ]
        if not names:
            extensions = extension or f"({'|'.join(VIDEO_EXTENSIONS)})"
            raise FrameError(video_id, path.parent, f"there is no file {path.name}.{extensions}", "missing")
        if len(names) > 1:
            several = " and ".join(sorted(names))
            raise FrameError(video_id, path.parent, f'{several} are there: say which by "extension" in the annotation')
        return path.parent / names[0]

    def _listing(self, video_id: str, folder: Path) -> dict[str, list[str]]:
        """The video files of a folder by their stem, listed once."""
        if folder not in self._listings:
            listing: dict[str, list[str]] = {}
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        stem, _, extension = entry.name.rpartition(".")
                        if extension.lower() in VIDEO_EXTENSIONS and _may_be_file(entry):
                            listing.setdefault(stem, []).append(entry.name)
            except OSError as error:
                raise unlisted(video_id, folder, error) from None
            self._listings[folder] = listing
        return self._listings[folder]

    def _index(self, video_id: str) -> VideoIndex:
        if video_id not in self._indices:
            path = self.find(video_id)
            try:
                self._indices[video_id] = self._cached_or_scanned(path)
            except BrokenVideo as error:
                raise FrameError(video_id, path, str(error), error.kind) from None
            except OSError as error:
                raise FrameError(video_id, path, error.strerror or str(error)) from None
        return unpack_index(self._indices[video_id])

    def _cached_or_scanned(self, path: Path) -> bytes:
        name, video = path.relative_to(self.folder).as_posix(), path.stat()
        packed = self._cache.find(name, video)
        if packed is None:
            packed = pack_index(index_video(path))
            self._cache.add(name, video, packed)
        return packed


def _may_be_file(entry: os.DirEntry[str]) -> bool:
    """True for a link that cannot be followed: opening the video will tell why."""
    try:
        return entry.is_file()
    except OSError:
        return True
