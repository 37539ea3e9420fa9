"""Stores of video files that are read in place: what all of them share, and a folder: which file in it is a video."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.frame_store import FrameError, Frames, Scan, place_and_stamp, unlisted
from adaclip_finetune.data.names import FolderNames, canonical, differing_forms
from adaclip_finetune.data.video.decoding import BrokenVideo, Member, Source, Stopped, never
from adaclip_finetune.data.video.discovery import has_video_extension, is_video_file
from adaclip_finetune.data.video.file import read_frames, scan_frames, stream_frames
from adaclip_finetune.data.video.index import FrameIndex, IndexCache, ShownTimes, unpack_index
from adaclip_finetune.data.video.remote import RemotePath

S = TypeVar("S", bound=Source)


class DecodedStore(ABC, Generic[S]):
    """What stores of encoded videos share: a subclass finds a video, and scans it for its frames.

    That is done when the video is first asked for.
    """

    def __init__(self) -> None:
        self._indices: dict[str, bytes] = {}  # packed into about a hundred bytes each, since there may be a million

    @abstractmethod
    def locate(self, video_id: str) -> S:
        """Return what the frames of a video are read from. Raises FrameError."""

    @abstractmethod
    def _packed_index(self, source: S) -> bytes:
        """Return the packed index of a video. Raises OSError and BrokenVideo."""

    def count(self, video_id: str) -> int:
        return self._index(video_id).num_frames

    def times(self, video_id: str) -> NDArray[np.float64] | None:
        return self._index(video_id).times()

    def read(self, video_id: str, indices: Sequence[int]) -> Frames:
        index = self._index(video_id)
        with self._named(video_id) as source:
            return read_frames(source, index, indices)

    def scan(self, video_id: str, stopped: Stopped = never) -> Scan:
        index = self._index(video_id)
        with self._named(video_id) as source:
            yield from scan_frames(source, index, stopped)

    def _index(self, video_id: str) -> FrameIndex:
        if video_id not in self._indices:
            with self._named(video_id) as source:
                self._indices[video_id] = self._packed_index(source)
        return unpack_index(self._indices[video_id])

    @contextmanager
    def _named(self, video_id: str) -> Iterator[S]:
        """Give the source of a video; errors in the body become FrameErrors that name the video and its file."""
        source = self.locate(video_id)
        path = source.path if isinstance(source, Member) else source
        try:
            yield source
        except BrokenVideo as error:
            raise FrameError(video_id, path, str(error), error.kind) from None
        except OSError as error:
            raise FrameError(video_id, path, error.strerror or str(error)) from None


class VideoFolder(DecodedStore[Path | RemotePath]):
    """A frame store for `folder/<video>.mp4` and the like. `extensions` chooses where a video has several files.

    A file is not scanned again if an earlier run scanned it and called `remember`.
    """

    def __init__(self, folder: Path, extensions: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.extensions = dict(extensions or {})
        self._names = FolderNames()
        self._listings: dict[Path, dict[str, list[str]]] = {}
        self._cache = IndexCache(folder)

    def stamp(self, video_id: str) -> str:
        return place_and_stamp(video_id, self.locate(video_id))

    def shown(self, video_id: str, frames: Sequence[int]) -> ShownTimes:
        """Return the length of the video and when a player shows these frames. Raises FrameError."""
        return self._index(video_id).shown(frames)

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
        return self.find(video_id)

    def _packed_index(self, source: Path | RemotePath) -> bytes:
        return self._cache.packed_index(source)

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
