"""Where frames come from: a folder of images a video, a pack of such folders, or the video files themselves.

A store holds paths and what it has learned about the videos, no open files: it can be copied into worker processes,
by fork or by pickle, and used in several threads. Whatever cannot be read is a FrameError; nothing is made up.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import VideoAnnotation
from adaclip_finetune.data.extensions import VIDEO_EXTENSIONS
from adaclip_finetune.data.index_cache import IndexCache, pack_index, unpack_index
from adaclip_finetune.data.pack import BrokenPack, Pack
from adaclip_finetune.data.video_file import (
    BrokenVideo,
    Stopped,
    VideoIndex,
    index_video,
    never,
    read_frames,
    scan_frames,
)
from adaclip_finetune.data.video_times import Times, video_times
from adaclip_finetune.errors import UserError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")

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


def open_store(config: Config, videos: Iterable[VideoAnnotation]) -> FrameStore:
    """The store that `frames_dir` or `video_dir` names. Raises UserError if it is not there, or no pack where it is a
    file."""
    key, folder = ("frames_dir", config.frames_dir) if config.frames_dir else ("video_dir", config.video_dir)
    if not folder:
        raise UserError("where are the videos? Give frames_dir (extracted frames) or video_dir (video files)")
    try:
        is_file, is_folder = Path(folder).is_file(), Path(folder).is_dir()
    except OSError as error:  # such as a name that is too long
        raise UserError(f"{key}: {folder}: {error.strerror}") from None
    if key == "frames_dir" and is_file:
        return PackedFrames(Path(folder))
    if not is_folder:
        raise UserError(f"{key}: {folder} is not a folder")
    if key == "frames_dir":
        return FrameFolder(Path(folder), config.img_tmpl)
    return VideoFolder(Path(folder), {video.video_id: video.extension for video in videos if video.extension})


class FrameFolder:
    """`folder/<video>/image_00001.jpg …`, numbered from 1 without gaps."""

    def __init__(self, folder: Path, img_tmpl: str) -> None:
        """img_tmpl: the file name with one place for the number, such as `image_{:05d}.jpg` (config.py checks it)."""
        self.folder = folder
        self.img_tmpl = img_tmpl
        self._name = _name_pattern(img_tmpl)
        self._counts: dict[str, int] = {}

    def count(self, video_id: str) -> int:
        if video_id not in self._counts:
            self._counts[video_id] = self._count(video_id)
        return self._counts[video_id]

    def read(self, video_id: str, indices: Sequence[int]) -> NDArray[np.uint8]:
        images = {i: self._image(video_id, i) for i in sorted(set(indices))}
        return _stacked(images, indices, video_id, self.folder / video_id)

    def scan(self, video_id: str, stopped: Stopped = never) -> Scan:
        return _one_by_one(self, video_id, stopped)

    def numbers(self, video_id: str) -> set[int]:
        """The numbers of the images in the video's folder. Raises FrameError if it cannot be listed."""
        folder = self.folder / video_id
        numbers = set()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    number = self.number(entry.name)
                    if number is not None:
                        numbers.add(number)
        except OSError as error:
            raise _unlisted(video_id, folder, error) from None
        return numbers

    def number(self, name: str) -> int | None:
        """Of the image that is called so; None for what is called otherwise."""
        found = self._name.fullmatch(name)
        return int(found[1]) if found and self.img_tmpl.format(int(found[1])) == name else None

    def path(self, video_id: str, index: int) -> Path:
        """The file of a frame."""
        return self.folder / video_id / self.img_tmpl.format(index + 1)

    def _count(self, video_id: str) -> int:
        folder, numbers = self.folder / video_id, self.numbers(video_id)
        if not numbers:
            raise FrameError(video_id, folder, f"holds no file named like {self.img_tmpl.format(1)}")
        if 0 in numbers:
            raise FrameError(video_id, folder, f"{self.img_tmpl.format(0)} is there, but images are numbered from 1")
        if (greatest := max(numbers)) > len(numbers):  # it may be a time, and too large to count up to
            gap = next(number for number in count(1) if number not in numbers)
            first, last = self.img_tmpl.format(gap), self.img_tmpl.format(greatest)
            raise FrameError(video_id, folder, f"{first} is missing, though {last} is there", "gap")
        return len(numbers)

    def _image(self, video_id: str, index: int) -> NDArray[np.uint8]:
        path = self.path(video_id, index)
        try:
            return _decoded(path)
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            # What the system refuses is no damage.
            kind: Kind = "unreadable" if isinstance(error, OSError) and error.errno else "damaged"
            raise FrameError(video_id, path, f"cannot be decoded ({error})", kind) from None


class PackedFrames:
    """The file that `adaclip pack` made of such folders: the same frames."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file is no pack."""
        self._pack = Pack(path)
        self._counts: dict[str, int] = {}

    def count(self, video_id: str) -> int:
        if video_id not in self._counts:
            try:
                record = self._pack.record(video_id)
            except (BrokenPack, OSError) as error:
                raise self._error(video_id, error) from None
            if record is None:
                raise FrameError(video_id, self._pack.path, "holds no video of this name", "missing")
            self._counts[video_id] = record.images
        return self._counts[video_id]

    def read(self, video_id: str, indices: Sequence[int]) -> NDArray[np.uint8]:
        different = sorted(set(indices))
        try:
            contents = self._pack.images(video_id, different)
        except (BrokenPack, OSError) as error:
            raise self._error(video_id, error) from None
        images = {i: self._image(video_id, i, content) for i, content in zip(different, contents, strict=True)}
        return _stacked(images, indices, video_id, self._pack.path)

    def scan(self, video_id: str, stopped: Stopped = never) -> Scan:
        return _one_by_one(self, video_id, stopped)

    def _error(self, video_id: str, error: BrokenPack | OSError) -> FrameError:
        kind: Kind = "damaged" if isinstance(error, BrokenPack) else "unreadable"
        return FrameError(video_id, self._pack.path, str(error), kind)

    def _image(self, video_id: str, index: int, content: bytes) -> NDArray[np.uint8]:
        try:
            return _decoded(io.BytesIO(content))
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            reason = f"{self._pack.image_name(index)} cannot be decoded ({error})"
            raise FrameError(video_id, self._pack.path, reason, "damaged") from None


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
                raise _unlisted(video_id, folder, error) from None
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


def _unlisted(video_id: str, folder: Path, error: OSError) -> FrameError:
    kind: Kind = "missing" if error.errno == errno.ENOENT else "unreadable"
    return FrameError(video_id, folder, error.strerror or str(error), kind)


def _one_by_one(store: FrameStore, video_id: str, stopped: Stopped) -> Scan:
    """`scan` where no frame needs another one."""
    for index in range(store.count(video_id)):
        if stopped():
            return
        yield index, store.read(video_id, [index])[0]


def _decoded(source: Path | io.BytesIO) -> NDArray[np.uint8]:
    with Image.open(source, formats=IMAGE_FORMATS) as image:
        return np.asarray(image.convert("RGB"))


def _stacked(
    images: Mapping[int, NDArray[np.uint8]], indices: Sequence[int], video_id: str, path: Path
) -> NDArray[np.uint8]:
    shapes = {image.shape for image in images.values()}
    if len(shapes) > 1:
        raise FrameError(video_id, path, f"frames differ in size: {sorted(shapes)}", "sizes")
    return np.stack([images[i] for i in indices])


def _name_pattern(img_tmpl: str) -> re.Pattern[str]:
    """What file names a template such as `image_{:05d}.jpg` gives; group 1 is the number."""
    before, _, rest = img_tmpl.partition("{")
    return re.compile(re.escape(before) + r"(\d+)" + re.escape(rest.partition("}")[2]), re.ASCII)
