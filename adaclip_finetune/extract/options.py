"""What `adaclip extract` is asked to do."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from adaclip_finetune.errors import UserError

# No folder, no leading dash or dot, one place for the number: ffmpeg reads it as a pattern, and so does training.
_PREFIX = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)?%(0[1-9])?d[A-Za-z0-9_.-]*\.(jpg|jpeg|png)")


@dataclass(frozen=True)
class ImageOptions:
    """Everything but the source that decides which images a video gives; a manifest keeps it.

    prefix: the name of image n (from 1) in printf's spelling. frame_rate: frames a second, -1 for all frames.
    frame_size: the shorter side in pixels, which is never enlarged, -1 for the video's. num_frames: only so many,
    evenly spread in time. quality: ffmpeg's for JPEG, from 2 (best) to 31.
    """

    prefix: str = "image_%05d.jpg"
    frame_rate: float = -1
    frame_size: int = -1
    num_frames: int | None = None
    quality: int = 2

    def __post_init__(self) -> None:
        """Raises UserError, which names the flag and its value."""
        _require(
            _PREFIX.fullmatch(self.prefix),
            f"--prefix {self.prefix!r}: must be a file name such as image_%05d.jpg, of letters, digits, _ . and -, "
            "with one place for the number, that ends in .jpg, .jpeg or .png",
        )
        _require(
            self.frame_rate == -1 or 0 < self.frame_rate <= 1000,
            f"--frame_rate {self.frame_rate:g}: must be frames a second, up to 1000, or -1 for all frames",
        )
        _require(
            self.frame_size == -1 or 1 <= self.frame_size <= 16384,
            f"--frame_size {self.frame_size}: must be from 1 to 16384 pixels, or -1 for the video's size",
        )
        _require(2 <= self.quality <= 31, f"--quality {self.quality}: must be from 2 (best) to 31 (smallest files)")
        if self.num_frames is not None:
            _require(
                self.num_frames >= 1, f"--num_frames {self.num_frames}: must be at least 1; omit it for all frames"
            )
            _require(self.frame_rate == -1, "--num_frames chooses among all frames of a video: omit --frame_rate")


@dataclass(frozen=True)
class ExtractionOptions:
    """One call of the command. `begin` and `end` (both included) count the videos in sorted order, from 0."""

    videos: Path
    frames: Path
    images: ImageOptions = field(default_factory=ImageOptions)
    formats: tuple[str, ...] | None = None  # extensions without dot, in lower case; None: every video
    begin: int = 0
    end: int | None = None
    file_list: Path | None = None
    clips: Path | None = None
    recursive: bool = False
    overwrite: bool = False
    dry_run: bool = False
    num_workers: int = 1
    time_limit: float = 3600.0  # seconds for one video

    def __post_init__(self) -> None:
        """Raises UserError, which names the flag and its value."""
        _require(
            self.begin >= 0 and (self.end is None or self.end >= self.begin),
            f"--begin {self.begin} --end {self.end}: must count up from 0; the last one is included",
        )
        _require(self.num_workers >= 1, f"--num_workers {self.num_workers}: must be at least 1")
        _require(self.time_limit > 0, f"--time_limit {self.time_limit:g}: must be a number of seconds above 0")
        _require(not (self.clips and self.file_list), "--clips names its videos itself: omit --file_list")


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _require(valid: object, message: str) -> None:
    if not valid:
        raise UserError(message)
