"""Cut moments out of video files with ffmpeg: as they are stored, or encoded anew to start at the very frame."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from adaclip_finetune.data.frame_store import stamp_of
from adaclip_finetune.data.video.decoding import CONTAINERS
from adaclip_finetune.data.video.discovery import is_video_file
from adaclip_finetune.data.video.program import find_program
from adaclip_finetune.durable import replacing
from adaclip_finetune.search.index import IndexedVideo

# Files whose streams are copied, and ffmpeg's name of the container. In others ffmpeg does not find every key frame.
_COPIED = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "webm",
    ".avi": "avi",
    ".flv": "flv",
}
_BEFORE = 10.0  # seconds that are decoded and passed over, so that no frame is missed where ffmpeg seeks badly
_TIME_LIMIT = 600  # seconds, for one clip


class CutFailed(Exception):
    """A clip could not be cut; the message is the reason."""


def has_file(video: IndexedVideo) -> bool:
    """Return whether the index was made of the video's file, not of frames in a folder or a pack."""
    return is_video_file(video.path) and not os.path.isdir(video.path)  # noqa: PTH112 (never raises)


def can_cut(video: IndexedVideo) -> bool:
    """Return whether parts of a video can be cut: it is a file on this machine."""
    return has_file(video) and isinstance(video.path, Path)


def check_unchanged(video: IndexedVideo) -> None:
    """Raise CutFailed if the file of a video is missing or is not what was indexed."""
    try:
        unchanged = stamp_of(video.path) == video.stamp and (video.path.is_file() or video.path.is_dir())
    except OSError as error:
        raise CutFailed(f"{video.path}: {error.strerror}") from error
    if not unchanged:
        raise CutFailed(f"{video.path}: has changed since it was indexed; run `adaclip index` again")


def clip_name(video: IndexedVideo, start: float, end: float, exact: bool) -> str:
    """Return a name for the file of a clip: the video, and the span in seconds. It ends in .mp4 if it is encoded."""
    suffix = video.path.suffix.lower()
    ending = suffix if suffix in _COPIED and not exact else ".mp4"
    stem = video.id[: -len(suffix)] if video.id.lower().endswith(suffix) and suffix else video.id
    plain = re.sub(r"[^\w.()+-]+", "_", stem)[-100:]
    return f"{plain}_{start:.1f}-{end:.1f}s{ending}"


def cut(video: IndexedVideo, start: float, end: float, target: Path, exact: bool = False) -> None:
    """Write the part of a video from `start` to `end`, in seconds, to `target`, with its sound.

    A copy of the streams takes no time and loses nothing, but begins at the key frame before `start`; in an mp4, most
    players skip to `start`. With `exact`, and from files such as ts and mpg, the clip is encoded anew (H.264, AAC).
    `target` is named by `clip_name`. Raise CutFailed, and write nothing, if that fails.
    """
    if not has_file(video):
        raise CutFailed(f"{video.id}: the index was made of frames; there is no video file")
    if not isinstance(video.path, Path):
        raise CutFailed(f"{video.path}: is not on this machine; download it, and cut it from an index of the copy")
    check_unchanged(video)
    reading = ["-format_whitelist", CONTAINERS, "-protocol_whitelist", "file"]
    source, length = ["-i", f"file:{video.path.absolute()}"], ["-t", f"{end - start:.3f}"]
    if exact or video.path.suffix.lower() not in _COPIED:
        seek = max(0.0, start - _BEFORE)
        words = ["-ss", f"{seek:.3f}"] if seek else []
        words += [*source, "-ss", f"{start - seek:.3f}", *length]
        words += ["-c:v", "libx264", "-crf", "18", "-preset", "veryfast", "-pix_fmt", "yuv420p", "-c:a", "aac"]
        # H.264 needs even sides; in units of a frame, the times of the first and the last one would be rounded.
        words += ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-enc_time_base", "1:90000"]
    else:
        words = ["-ss", f"{start:.3f}", *source, *length, "-c", "copy"]
    program = [find_program(), "-nostdin", "-hide_banner", "-v", "error", "-y", "-abort_on", "empty_output", *reading]
    words += ["-map", "0:V:0", "-map", "0:a?", "-map_metadata", "-1", "-f", _COPIED[target.suffix]]
    with replacing(target) as part:
        try:
            done = subprocess.run(
                [*program, *words, f"file:{part}"], capture_output=True, check=False, timeout=_TIME_LIMIT
            )
        except subprocess.TimeoutExpired as error:
            raise CutFailed(f"{video.path}: ffmpeg was not done after {_TIME_LIMIT} s") from error
        if done.returncode != 0 or not part.stat().st_size:
            told = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise CutFailed(f"{video.path}: {'; '.join(told[:3])[:500] or 'ffmpeg wrote nothing'}")
