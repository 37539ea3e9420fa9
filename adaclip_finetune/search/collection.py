"""The videos that an index is made of: those in a folder and its subfolders, or those of an annotation."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import check_name, load_annotations
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FileStamp, FrameError, FrameStore, stamp_of
from adaclip_finetune.data.frames import open_store
from adaclip_finetune.data.video.discovery import find_videos, has_video_extension
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.data.video.index import IndexCache
from adaclip_finetune.data.video.remote import RemotePath
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.metadata import ENDINGS, metadata_beside
from adaclip_finetune.search.transcripts import transcripts_beside


@dataclass(frozen=True)
class CollectionVideo:
    """A video to be indexed; `path` is its file, the folder of its frames, or the pack that holds them."""

    id: str
    path: Path | RemotePath
    stamp: FileStamp
    captions: tuple[str, ...] = ()
    duration: float | None = None  # seconds, as annotated
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class VideoCollection:
    """Videos to be indexed, and the store that reads their frames."""

    name: Path | RemotePath  # of the folder or the annotation
    root: Path | RemotePath  # the folder that holds the files
    videos: list[CollectionVideo]
    broken: dict[str, str]  # id → why the video cannot be read
    store: FrameStore
    others: list[Path] = field(default_factory=list)  # files in the folder that are not videos
    problems: list[str] = field(default_factory=list)  # files beside videos that cannot be read
    transcripts: dict[str, list[Path]] = field(default_factory=dict)  # id → files beside the video

    @property
    def img_tmpl(self) -> str | None:
        """Return how the frames' files are named, if the frames are files."""
        return self.store.img_tmpl if isinstance(self.store, FrameFolder) else None

    def only(self, videos: Sequence[CollectionVideo]) -> VideoCollection:
        """Return some of the videos, with a store that knows no others."""
        store = self.store.only([video.id for video in videos]) if isinstance(self.store, VideoFiles) else self.store
        return replace(self, videos=list(videos), broken={}, store=store, others=[])

    def times(self, video: CollectionVideo, frames: Sequence[int]) -> tuple[float | None, list[float | None]]:
        """Return the length of a video and the times at which a player shows these frames, in seconds; None where that
        is not known. Raise FrameError."""
        if isinstance(self.store, VideoFolder):
            times = self.store.shown(video.id, frames)
            annotated = None if times.length_measured else video.duration
            return times.length if annotated is None else annotated, times.shown
        if (shown := self.store.times(video.id)) is not None:
            return video.duration, [round(float(shown[frame]), 3) for frame in frames]
        if video.duration is None:
            return None, [None] * len(frames)
        count = self.store.count(video.id)
        return video.duration, [frame / count * video.duration for frame in frames]


class VideoFiles(VideoFolder):
    """Video files by id, anywhere below `folder`; `files` maps each id to its path relative to the folder."""

    def __init__(self, folder: Path | RemotePath, files: Mapping[str, str]) -> None:
        super().__init__(Path(folder))
        self._root, self._files, self._cache = folder, dict(files), IndexCache(folder)

    def only(self, video_ids: Iterable[str]) -> VideoFiles:
        """Return a store of some of the videos."""
        return VideoFiles(self._root, {video_id: self._files[video_id] for video_id in video_ids})

    def locate(self, video_id: str) -> Path | RemotePath:
        return self._root / self._files[video_id]


def copies_among(videos: Sequence[CollectionVideo], known: Sequence[CollectionVideo]) -> dict[str, str]:
    """Return the id of each of the `videos` with the bytes of a known one, or else of an earlier one → the other's id.

    Only files of a size that one of the `videos` shares are read. One that cannot be read is no copy.
    """
    earliest: dict[tuple[int, bytes], str] = {}
    copies = {}
    own, sizes = {video.stamp.size for video in videos}, Counter(video.stamp.size for video in (*known, *videos))
    for number, video in enumerate((*known, *videos)):
        if sizes[video.stamp.size] == 1 or video.stamp.size not in own:
            continue
        digest = hashlib.sha256()
        try:
            with video.path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        except OSError:
            continue
        first = earliest.setdefault((video.stamp.size, digest.digest()), video.id)
        if first != video.id and number >= len(known):
            copies[video.id] = first
    return copies


def collect_folder(folder: Path) -> VideoCollection:
    """Return all video files in a folder and its subfolders, except hidden ones. The id of a video is its path relative
    to the folder. Raise UserError for a folder that cannot be listed."""
    root = folder.absolute()
    try:
        paths, others = find_videos(root)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from error
    videos, broken = [], {}
    for path in paths:
        name = path.relative_to(root).as_posix()
        try:
            check_name("video", name)
            if path.exists() and not path.is_file():
                raise UserError("not a file")  # opening a pipe would wait for ever
            videos.append(CollectionVideo(name, path, stamp_of(path)))
        except (OSError, UserError) as error:
            broken[name.encode("utf-8", "replace").decode()] = getattr(error, "strerror", None) or str(error)
    store = VideoFiles(root, {video.id: video.id for video in videos})
    return _with_sidecars(VideoCollection(root, root, videos, broken, store, others))


def collect_remote(folder: RemotePath) -> VideoCollection:
    """Return the files below a URL that are called like videos. Raise UserError if it cannot be listed."""
    try:
        files = folder.files()
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from error
    videos, broken = [], {}
    for name in filter(has_video_extension, files):
        try:
            check_name("video", name)
            if "//" in name:
                raise UserError("a name with two slashes in a row cannot be read")
            videos.append(CollectionVideo(name, folder / name, FileStamp(*files[name])))
        except UserError as error:
            broken[name] = str(error)
    others = [Path(name) for name in files if not has_video_extension(name)]
    store = VideoFiles(folder, {video.id: video.id for video in videos})
    return VideoCollection(folder, folder, videos, broken, store, others)


def collect_annotation(annotation: Path, config: Config) -> VideoCollection:
    """Return the videos of an annotation, below the `video_dir` or `frames_dir` of the settings. Raise UserError."""
    listed = load_annotations(annotation)
    key = "frames_dir" if config.frames_dir else "video_dir"
    root = Path(getattr(config, key) or "").expanduser().absolute()
    if getattr(config, key):
        config = config.model_copy(update={key: str(root)})
    store = open_store(config, listed)
    videos, broken = [], {}
    for video in listed:
        try:
            path = _path(store, root, video.video_id)
            known = stamp_of(path), video.sentences, video.duration, video.metadata
            videos.append(CollectionVideo(video.video_id, path, *known))
        except FrameError as error:
            broken[video.video_id] = f"{error.path}: {error.reason}"
        except OSError as error:
            broken[video.video_id] = f"{error.filename}: {error.strerror}"
    if isinstance(store, VideoFolder):
        store = VideoFiles(root, {video.id: video.path.relative_to(root).as_posix() for video in videos})
    return _with_sidecars(VideoCollection(annotation.absolute(), root, videos, broken, store))


def _with_sidecars(collection: VideoCollection) -> VideoCollection:
    """Add what files beside the videos say; what the annotation says has precedence."""
    if not isinstance(collection.store, VideoFolder):
        return collection
    videos, problems, ids = [], [], dict[Path, str]()
    for video in collection.videos:
        assert isinstance(video.path, Path), "what lies beside videos in object storage is not read"
        ids[video.path] = video.id
        try:
            videos.append(replace(video, metadata={**metadata_beside(video.path), **video.metadata}))
        except UserError as error:
            videos.append(video)
            problems.append(str(error))
    beside = {path.with_suffix(ending) for path in ids for ending in ENDINGS}
    transcripts = {ids[path]: files for path, files in transcripts_beside(ids).items()}
    beside.update(*transcripts.values())
    others = [path for path in collection.others if path not in beside]
    return replace(collection, videos=videos, others=others, problems=problems, transcripts=transcripts)


def _path(store: FrameStore, root: Path, video_id: str) -> Path:
    if isinstance(store, VideoFolder):
        return store.find(video_id)
    return store.video_folder(video_id) if isinstance(store, FrameFolder) else root
