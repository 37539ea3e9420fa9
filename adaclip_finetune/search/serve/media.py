"""The files of an index, given out by key: a video, its picture, the frames that its vector was made of.

A key is looked up among the rows of the index, so no request names a file. A file is opened first and then compared
with what was indexed, so that nothing can take its place in between.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from adaclip_finetune.config import Config
from adaclip_finetune.data.extensions import VIDEO_EXTENSIONS
from adaclip_finetune.data.frames import FrameError, FrameFolder, FrameStore, PackedFrames
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import IndexedVideo, VideoIndex
from adaclip_finetune.search.serve.worker import Worker
from adaclip_finetune.search.stored import read_index
from adaclip_finetune.search.videos import VideoFiles

MEDIA_TYPES = {"mp4": "video/mp4", "m4v": "video/mp4", "mov": "video/quicktime", "webm": "video/webm"} | {
    "mkv": "video/x-matroska", "avi": "video/x-msvideo", "mpg": "video/mpeg", "mpeg": "video/mpeg"
}  # fmt: skip

_SIDE = 320  # pixels, the longer one of a frame's picture
_REMEMBERED = 100  # videos whose frames' pictures are kept in memory
_WAITING = 64  # requests for frames


class Gone(Exception):
    """There is nothing of that key, or it is not any more what was indexed; the message says which."""


class Stamp(NamedTuple):
    """By which a file is known to be as it was indexed."""

    size: int  # bytes
    mtime_ns: int


class Media:
    """By key: files, and pictures of frames. None but pictures of best frames before `learn_stamps`."""

    def __init__(self, index: VideoIndex) -> None:
        self._index = index
        self._videos = {key_of(video): video for video in index.videos}
        self._stamps: dict[str, Stamp] = {}
        self._frames = _Frames(index)

    def learn_stamps(self) -> None:
        """What the files were like when they were indexed; takes its time where they are many. Raises UserError if the
        index is being rewritten at this moment."""
        rows = read_index(self._index.folder).videos
        if [row["id"] for row in rows] != [video.id for video in self._index.videos]:
            raise UserError(f"{self._index.folder}: is being rewritten; try again when `adaclip index` is done")
        try:
            stamps = [Stamp(int(row["size"]), int(row["mtime_ns"])) for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._index.folder}: its videos.jsonl is not as adaclip writes it ({error!r})"
            ) from error
        self._stamps = dict(zip(map(key_of, self._index.videos), stamps, strict=True))

    @property
    def working(self) -> bool:
        """Whether frames are being decoded at this moment."""
        return self._frames.working

    def is_file(self, video: IndexedVideo) -> bool:
        """Whether the video is one file by itself, and not frames in a folder or a pack."""
        return _is_video(video.path)

    def video(self, key: str) -> tuple[BinaryIO, str]:
        """The video's file, opened, and its media type. Raises Gone."""
        video = self._found(key)
        if not _is_video(video.path):
            raise Gone(f"{video.id}: the index was made of its frames; there is no video file")
        media_type = MEDIA_TYPES.get(_extension(video.path), "application/octet-stream")
        return _opened(video.path, self._stamp(key)), media_type

    def poster(self, key: str) -> BinaryIO:
        """The picture of the best frame (JPEG), opened. Raises Gone."""
        video = self._found(key)
        if video.thumb is None:
            raise Gone(f"{video.id}: has no picture")
        return _opened(video.thumb)

    async def frame(self, key: str, place: int) -> bytes:
        """A JPEG of the frame at this place among those that the vector was made of. Raises Gone, Busy."""
        video = self._found(key)
        if not 0 <= place < len(video.frames):
            raise Gone(f"{video.id}: has {len(video.frames)} frames here")
        _check(video.path, self._stamp(key))
        return (await self._frames.pictures(video))[place]

    def _stamp(self, key: str) -> Stamp:
        if key not in self._stamps:
            raise Gone("the index is still being read")
        return self._stamps[key]

    def _found(self, key: str) -> IndexedVideo:
        if key not in self._videos:
            raise Gone("the index has no such video")
        return self._videos[key]


def key_of(video: IndexedVideo) -> str:
    """The same for the same video in every index, and nothing that a path could be made of."""
    return hashlib.sha256(repr((video.id, str(video.path))).encode()).hexdigest()[:20]


class _Frames:
    """Pictures of frames, decoded for all frames of a video at once by a thread of its own, and remembered."""

    def __init__(self, index: VideoIndex) -> None:
        root = Path(index.about.root)
        inside = [video for video in index.videos if _is_video(video.path) and video.path.is_relative_to(root)]
        self._files = VideoFiles(root, {video.id: video.path.relative_to(root).as_posix() for video in inside})
        self._img_tmpl = str(index.about.settings.get("img_tmpl", Config.model_fields["img_tmpl"].default))
        self._worker = Worker("frames", _WAITING)
        self._known: OrderedDict[str, list[bytes]] = OrderedDict()

    @property
    def working(self) -> bool:
        """Whether frames are being decoded at this moment."""
        return self._worker.working

    async def pictures(self, video: IndexedVideo) -> list[bytes]:
        """A JPEG a frame. Raises Gone, Busy."""
        return await self._worker.do(lambda: self._pictures(video))

    def _pictures(self, video: IndexedVideo) -> list[bytes]:
        if video.id not in self._known:
            self._known[video.id] = self._decoded(video)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(video.id)
        return self._known[video.id]

    def _decoded(self, video: IndexedVideo) -> list[bytes]:
        try:
            store, name = self._store(video)
            if max(video.frames, default=0) >= store.count(name):
                raise Gone(f"{video.id}: has fewer frames than when it was indexed")
            return _jpegs(store, name, video.frames)
        except (FrameError, UserError, KeyError) as error:
            raise Gone(f"{video.id}: its frames cannot be read ({error})") from error

    def _store(self, video: IndexedVideo) -> tuple[FrameStore, str]:
        """Where its frames are, and under which name."""
        if _is_video(video.path):
            return self._files, video.id
        if video.path.is_dir():
            return FrameFolder(video.path.parent, self._img_tmpl), video.path.name
        return PackedFrames(video.path), video.id


def _jpegs(store: FrameStore, name: str, frames: Sequence[int]) -> list[bytes]:
    pictures = []
    for frame in store.read(name, frames):
        picture, content = Image.fromarray(frame), io.BytesIO()
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
        picture.save(content, "JPEG", quality=80)
        pictures.append(content.getvalue())
    return pictures


def _opened(path: Path, stamp: Stamp | None = None) -> BinaryIO:
    """The file, if it is a plain one, and as `stamp` says. Without a stamp no link is followed. Raises Gone."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe is not waited for
    try:
        descriptor = os.open(path, flags if stamp else flags | os.O_NOFOLLOW)
    except (OSError, ValueError) as error:
        raise Gone(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and stamp in (None, (found.st_size, found.st_mtime_ns)):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise _changed(path)


def _check(path: Path, stamp: Stamp) -> None:
    """Of a file, a pack, or a folder of frames. Raises Gone."""
    try:
        found = path.stat()
    except OSError as error:
        raise Gone(f"{path}: {error.strerror}") from error
    if (found.st_size, found.st_mtime_ns) != stamp:
        raise _changed(path)


def _changed(path: Path) -> Gone:
    return Gone(f"{path}: is not what it was when it was indexed; `adaclip index` again")


def _is_video(path: Path) -> bool:
    return _extension(path) in VIDEO_EXTENSIONS


def _extension(path: Path) -> str:
    return path.suffix[1:].lower()
