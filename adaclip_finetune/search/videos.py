"""The videos that an index is made of: those of a folder and the folders in it, or those of an annotation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import VideoAnnotation, check_name, load_annotations
from adaclip_finetune.data.extensions import VIDEO_EXTENSIONS
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FrameError, FrameStore
from adaclip_finetune.data.frames import open_store
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.stamp import Stamp, stamp_of


@dataclass(frozen=True)
class Clip:
    """A video to be indexed: `path` is its file, its folder of frames, or the pack that holds it."""

    id: str
    path: Path
    stamp: Stamp
    captions: tuple[str, ...] = ()
    duration: float | None = None  # seconds, as annotated


@dataclass(frozen=True)
class Source:
    """`clips`, what of them cannot be read (`broken`: id → reason), and where their frames come from."""

    name: Path  # the folder or the annotation
    root: Path  # the folder that the files lie in
    clips: list[Clip]
    broken: dict[str, str]
    store: FrameStore

    @property
    def img_tmpl(self) -> str | None:
        """How the frames' files are called, where they are files."""
        return self.store.img_tmpl if isinstance(self.store, FrameFolder) else None

    def times(self, clip: Clip, frames: Sequence[int]) -> tuple[float | None, list[float | None]]:
        """Seconds: how long the video is, and when a player shows these frames. None: not known."""
        if isinstance(self.store, VideoFolder):
            times = self.store.times(clip.id, frames)
            annotated = None if times.length_measured else clip.duration
            return times.length if annotated is None else annotated, times.shown
        if clip.duration is None:
            return None, [None] * len(frames)
        count = self.store.count(clip.id)
        return clip.duration, [frame / count * clip.duration for frame in frames]


class VideoFiles(VideoFolder):
    """Video files by id, wherever below `folder` they lie: `files` gives their names relative to it."""

    def __init__(self, folder: Path, files: Mapping[str, str]) -> None:
        super().__init__(folder)
        self.files = dict(files)

    def find(self, video_id: str) -> Path:
        return self.folder / self.files[video_id]


def videos_of_folder(folder: Path) -> Source:
    """Every video file in the folder and below it, hidden ones left out; links to folders are not followed. An id is
    the path from the folder on. Raises UserError for a folder that is not there or cannot be listed."""
    root = folder.absolute()
    clips, broken = [], {}
    for path in _walk(root):
        name = path.relative_to(root).as_posix()
        try:
            check_name("video", name)
            if not path.is_file() and path.exists():  # a pipe would be waited for
                raise UserError("is no file")
            clips.append(Clip(name, path, stamp_of(path)))
        except (OSError, UserError) as error:
            shown = name.encode("utf-8", "replace").decode()
            broken[shown] = getattr(error, "strerror", None) or str(error)
    return Source(root, root, clips, broken, VideoFiles(root, {clip.id: clip.id for clip in clips}))


def videos_of_annotation(annotation: Path, config: Config) -> Source:
    """The videos that an annotation names, below the `video_dir` or `frames_dir` of the settings. Raises UserError."""
    listed = load_annotations(annotation)
    key = "frames_dir" if config.frames_dir else "video_dir"
    root = Path(getattr(config, key) or "").expanduser().absolute()
    if getattr(config, key):
        config = config.model_copy(update={key: str(root)})
    store = open_store(config, listed)
    clips, broken = [], {}
    for video in listed:
        try:
            path = _place(store, root, video)
            clips.append(Clip(video.video_id, path, stamp_of(path), video.sentences, video.duration))
        except FrameError as error:
            broken[video.video_id] = f"{error.path}: {error.reason}"
        except OSError as error:
            broken[video.video_id] = f"{error.filename}: {error.strerror}"
    if isinstance(store, VideoFolder):
        store = VideoFiles(root, {clip.id: clip.path.relative_to(root).as_posix() for clip in clips})
    return Source(annotation.absolute(), root, clips, broken, store)


def _walk(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder of videos")

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    for folder, inner, names in os.walk(root, onerror=refuse):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.rpartition(".")[2].lower() in VIDEO_EXTENSIONS:
                yield Path(folder, name)


def _place(store: FrameStore, root: Path, video: VideoAnnotation) -> Path:
    """Raises FrameError where there is no such file."""
    if isinstance(store, VideoFolder):
        return store.find(video.video_id)
    return root if root.is_file() else root / video.video_id
