"""The files of an index, given out by key: a video, its picture, the frames that its vector was made of.

A key is looked up among the rows of the index, so no request names a file. A file that is given out is opened first
and then compared with what was indexed, so that nothing can take its place in between. What frames are decoded from is
opened by its name: it is compared before and after.
"""

from __future__ import annotations

import io
import os
import stat
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from adaclip_finetune.config import Config
from adaclip_finetune.data.extensions import VIDEO_EXTENSIONS
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FrameError, FrameStore
from adaclip_finetune.data.packed_frames import PackedFrames
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import IndexedVideo, VideoIndex
from adaclip_finetune.search.serve.worker import Worker
from adaclip_finetune.search.stamp import Stamp, stamp_of
from adaclip_finetune.search.videos import VideoFiles

MEDIA_TYPES = {"mp4": "video/mp4", "m4v": "video/mp4", "mov": "video/quicktime", "webm": "video/webm"} | {
    "mkv": "video/x-matroska", "avi": "video/x-msvideo", "mpg": "video/mpeg", "mpeg": "video/mpeg"
}  # fmt: skip

_SIDE = 320  # pixels, the longer one of a frame's picture
_REMEMBERED = 100  # videos whose frames' pictures are kept in memory


class Gone(Exception):
    """There is nothing of that key, or it is not any more what was indexed; the message says which."""


class Media:
    """By key: files, and pictures of frames."""

    def __init__(self, index: VideoIndex, frames: Worker) -> None:
        """`frames` is who decodes."""
        self.index = index
        self._rows = {_key(digest): row for row, digest in enumerate(index.videos.digests())}
        self._frames = _Frames(index, frames)

    def is_file(self, video: IndexedVideo) -> bool:
        """Whether the video is one file by itself, and not frames in a folder or a pack."""
        return _is_video(video.path)

    def video(self, key: str) -> tuple[BinaryIO, str]:
        """The video's file, opened, and its media type. Raises Gone."""
        video = self._found(key)
        if not _is_video(video.path):
            raise Gone(f"{video.id}: the index was made of its frames; there is no video file")
        media_type = MEDIA_TYPES.get(_extension(video.path), "application/octet-stream")
        return _opened(video.path, video.stamp), media_type

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
        return (await self._frames.pictures(video))[place]

    def _found(self, key: str) -> IndexedVideo:
        if key not in self._rows:
            raise Gone("the index has no such video, or none any more that is as it was; search again")
        return self.index.videos[self._rows[key]]


def key_of(video: IndexedVideo) -> str:
    """The same as long as an index tells the same of a video, another one for a file that was changed, and nothing that
    a path could be made of."""
    return _key(video.digest)


def _key(digest: str) -> str:
    return digest[:20]


class _Frames:
    """Pictures of frames, decoded for all frames of a video at once by a thread of its own, and remembered."""

    def __init__(self, index: VideoIndex, worker: Worker) -> None:
        self._files = VideoFiles(Path(index.about.root), {})  # which knows what indexing learned of them
        self._img_tmpl = str(index.about.settings.get("img_tmpl", Config.model_fields["img_tmpl"].default))
        self._worker = worker
        self._known: OrderedDict[str, list[bytes]] = OrderedDict()

    async def pictures(self, video: IndexedVideo) -> list[bytes]:
        """A JPEG a frame. Raises Gone, Busy."""
        return await self._worker.do(lambda: self._pictures(video))

    def _pictures(self, video: IndexedVideo) -> list[bytes]:
        _check(video.path, video.stamp)
        if video.id not in self._known:
            try:
                pictures = self._decoded(video)
            finally:
                self._check_again(video)
            self._known[video.id] = pictures
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(video.id)
        return self._known[video.id]

    def _check_again(self, video: IndexedVideo) -> None:
        try:
            _check(video.path, video.stamp)
        except Gone:
            self._files = VideoFiles(self._files.folder, {})  # what it has learned may be of another file
            raise

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
            if not video.path.is_relative_to(self._files.folder):  # it vanished from another folder, and was kept
                return VideoFiles(video.path.parent, {video.id: video.path.name}), video.id
            self._files.files[video.id] = str(video.path)
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
        found = stamp_of(path)
    except OSError as error:
        raise Gone(f"{path}: {error.strerror}") from error
    if found != stamp:
        raise _changed(path)


def _changed(path: Path) -> Gone:
    return Gone(f"{path}: was changed since it was indexed; run `adaclip index` again")


def _is_video(path: Path) -> bool:
    """Not a folder of frames, which may be called like one."""
    try:
        return _extension(path) in VIDEO_EXTENSIONS and not path.is_dir()
    except OSError:  # opening it will tell why
        return True


def _extension(path: Path) -> str:
    return path.suffix[1:].lower()
