"""Open the store of frames that a config names: images in folders or in a pack, video files, or tar shards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import VideoAnnotation
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FrameStore
from adaclip_finetune.data.packed_frames import PackedFrames
from adaclip_finetune.data.tar_shards import TarShards, holds_shards
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.errors import UserError


def open_store(config: Config, videos: Iterable[VideoAnnotation]) -> FrameStore:
    """Open the store that `frames_dir` or `video_dir` names. Raises UserError if there is none."""
    key, folder = ("frames_dir", config.frames_dir) if config.frames_dir else ("video_dir", config.video_dir)
    if not folder:
        raise UserError("no videos are given: set frames_dir (extracted frames) or video_dir (video files)")
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
    if holds_shards(Path(folder)):
        return TarShards(Path(folder))
    return VideoFolder(Path(folder), {video.video_id: video.extension for video in videos if video.extension})
