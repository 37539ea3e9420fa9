"""A folder of video files that are read in place: which file is a video, and its frames."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.frame_store import FrameError, Frames, Scan, stamp_of_files, unlisted
from adaclip_finetune.data.names import FolderNames, canonical, differing_forms
from adaclip_finetune.data.video.decoding import BrokenVideo, Stopped, never
from adaclip_finetune.data.video.discovery import has_video_extension, is_video_file
from adaclip_finetune.data.video.file import read_frames, scan_frames, stream_frames
from adaclip_finetune.data.video.index import FrameIndex, IndexCache, ShownTimes, unpack_index
from adaclip_finetune.data.video.remote import RemotePath


class VideoFolder:
    """A frame store for `folder/<video>.mp4` and the like. `extensions` chooses where a video has several files.

    A file is scanned for its frames when it is first asked for, unless an earlier run scanned it and called `remember`.
    """

    def __init__(self, folder: Path, extensions: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.extensions = dict(extensions or {})
        self._names = FolderNames()
        self._listings: dict[Path, dict[str, list[str]]] = {}
        self._indices: dict[str, bytes] = {}  # packed into about a hundred bytes each, since there may be a million
        self._cache = IndexCache(folder)

    def count(self, video_id: str) -> int:
        return self._index(video_id).num_frames

    def times(self, video_id: str) -> NDArray[np.float64] | None:
        return self._index(video_id).times()

    def stamp(self, video_id: str) -> str:
        return stamp_of_files(video_id, self.locate(video_id))

    def shown(self, video_id: str, frames: Sequence[int]) -> ShownTimes:
        """Return the length of the video and when a player shows these frames. Raises FrameError."""
        return self._index(video_id).shown(frames)

    def read(self, video_id: str, indices: Sequence[int]) -> Frames:
        index = self._index(video_id)
        with self._named(video_id) as path:
            return read_frames(path, index, indices)

    def scan(self, video_id: str, stopped: Stopped = never) -> Scan:
        index = self._index(video_id)
        with self._named(video_id) as path:
            yield from scan_frames(path, index, stopped)

    def stream(self, video_id: str, indices: Sequence[int]) -> Scan:
        """Give the frames with these indices (ascending, each once), in one pass over the file. Raises FrameError."""
        index = self._index(video_id)
        with self._named(video_id) as path:
            yield from stream_frames(path, index, indices)

    def remember(self) -> None:
        """Keep what was found in the videos for later runs."""
        self._cache.save()

    def find(self, video_id: str) -> Path:
        """Return the file of a video: its name is the id, with or without the extension, in any Unicode form.

        Raises FrameError if there is no such file, or if there are several (`extensions` chooses among them).
        """
        folder = self._names.find(self.folder, video_id).parent
        name, extension = canonical(video_id).rpartition("/")[2], self.extensions.get(video_id)
        there = self._listing(video_id, folder).get(name, [])
        found = [file for file in there if extension is None or file.lower().endswith(f".{extension}")]
        # Only where no file is called like a video are those of other names opened to see whether they are videos.
        found = [file for file in found if has_video_extension(file)] or [
            file for file in found if is_video_file(folder / file)
        ]
        if not found:
            wanted = name if has_video_extension(name) else f"{name}.{extension or '*'}"
            others = ", ".join(sorted(file for file in there if not has_video_extension(file)))
            reason = f"there is no video file {wanted}" + (f"; {others} cannot be opened as a video" if others else "")
            raise FrameError(video_id, folder, reason, "missing")
        if message := differing_forms(found):
            raise FrameError(video_id, folder, message)
        if len(found) > 1:
            several = " and ".join(sorted(found))
            raise FrameError(video_id, folder, f'{several} are there: say which by "extension" in the annotation')
        return folder / found[0]

    def locate(self, video_id: str) -> Path | RemotePath:
        """Return the file that the frames of a video are read from. Raises FrameError."""
        return self.find(video_id)

    def other_files(self) -> list[Path]:
        """Return the files that are no videos, of the folders in which videos were looked up."""
        files = {folder / name for folder, listing in self._listings.items() for name in chain(*listing.values())}
        return sorted(path for path in files if not path.name.startswith(".") and not is_video_file(path))

    def _listing(self, video_id: str, folder: Path) -> dict[str, list[str]]:
        """Return the files of a folder by their names in canonical form, with and without extension."""
        if folder not in self._listings:
            listing: dict[str, list[str]] = {}

            def refuse(error: OSError) -> None:
                raise unlisted(video_id, folder, error) from None

            for name in next(os.walk(folder, onerror=refuse))[2]:
                for key in {canonical(name), canonical(Path(name).stem)}:
                    listing.setdefault(key, []).append(name)
            self._listings[folder] = listing
        return self._listings[folder]

    def _index(self, video_id: str) -> FrameIndex:
        if video_id not in self._indices:
            with self._named(video_id) as path:
                self._indices[video_id] = self._cache.packed_index(path)
        return unpack_index(self._indices[video_id])

    @contextmanager
    def _named(self, video_id: str) -> Iterator[Path | RemotePath]:
        """Give the file of a video; errors in the body become FrameErrors that name both."""
        path = self.locate(video_id)
        try:
            yield path
        except BrokenVideo as error:
            raise FrameError(video_id, path, str(error), error.kind) from None
        except OSError as error:
            raise FrameError(video_id, path, error.strerror or str(error)) from None
