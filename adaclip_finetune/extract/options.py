"""What `adaclip extract` is asked to do, checked before anything is touched."""

from __future__ import annotations

import math
import os
import re
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, fields
from pathlib import Path

from adaclip_finetune.data.extensions import VIDEO_EXTENSIONS
from adaclip_finetune.errors import UserError

# No folder, no leading dash or dot, one place for the number: ffmpeg reads it as a pattern, and so does training.
_PREFIX = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9_.-]*%(0[1-9])?d[A-Za-z0-9_.-]*\.(jpg|jpeg|png)|%(0[1-9])?d\.(jpg|jpeg|png)"
)


@dataclass(frozen=True)
class Look:
    """Everything but the source that decides which images a video gives; a manifest keeps it. -1 and None: all, native.

    prefix is the name of image n as C's printf spells it; frame_size the shorter side in pixels, never enlarging;
    quality ffmpeg's for JPEG, from 2 (best) to 31.
    """

    prefix: str = "image_%05d.jpg"
    frame_rate: float = -1
    frame_size: int = -1
    num_frames: int | None = None
    quality: int = 2

    def __post_init__(self) -> None:
        """Raises UserError, naming flag and value."""
        if not _PREFIX.fullmatch(self.prefix):
            raise UserError(
                f"--prefix {self.prefix!r}: must name one image by its number and end in .jpg, .jpeg or .png, "
                "in letters, digits, _ . and - only, such as image_%05d.jpg"
            )
        if self.frame_rate != -1 and not (math.isfinite(self.frame_rate) and 0 < self.frame_rate <= 1000):
            raise UserError(f"--frame_rate {self.frame_rate:g}: must be frames a second, up to 1000, or -1 for native")
        if self.frame_size != -1 and not 1 <= self.frame_size <= 16384:
            raise UserError(f"--frame_size {self.frame_size}: must be pixels from 1 to 16384, or -1 for native")
        if not 2 <= self.quality <= 31:
            raise UserError(f"--quality {self.quality}: must be from 2 (best) to 31 (smallest files)")
        if self.num_frames is not None and self.num_frames < 1:
            raise UserError(f"--num_frames {self.num_frames}: must be 1 or more; leave it out for all frames")
        if self.num_frames is not None and self.frame_rate != -1:
            raise UserError("--num_frames picks among all frames of a video: leave out --frame_rate")

    @property
    def is_jpeg(self) -> bool:
        return not self.prefix.endswith(".png")

    def image_name(self, number: int) -> str:
        """The file name of an image; the first is number 1."""
        return self.prefix % number


@dataclass(frozen=True)
class Request:
    """One call of the command. `begin` and `end` (both included) count the videos of the listing, from 0."""

    videos: Path
    frames: Path
    look: Look
    formats: tuple[str, ...] = VIDEO_EXTENSIONS
    begin: int = 0
    end: int | None = None
    file_list: Path | None = None
    clips: Path | None = None
    recursive: bool = False
    overwrite: bool = False
    dry_run: bool = False
    num_workers: int = 1
    time_limit: float = 3600.0  # seconds, of one ffmpeg

    def __post_init__(self) -> None:
        """Raises UserError, naming flag and value."""
        for name in self.formats:
            if name not in VIDEO_EXTENSIONS:
                raise UserError(f"--accepted_formats {name}: not among {' '.join(VIDEO_EXTENSIONS)}")
        if self.begin < 0 or (self.end is not None and self.end < self.begin):
            raise UserError(f"--begin {self.begin} --end {self.end}: must count up from 0; the last one is included")
        if self.num_workers < 1:
            raise UserError(f"--num_workers {self.num_workers}: must be 1 or more")
        if not self.time_limit > 0:
            raise UserError(f"--time_limit {self.time_limit:g}: must be a number of seconds above 0")
        if self.clips and self.file_list:
            raise UserError("--clips names its videos itself: leave out --file_list")


def declare(parser: ArgumentParser) -> None:
    """The flags of the published tool, and the new ones below them."""
    native = "[default: -1, native]"
    parser.add_argument("videos", metavar="VIDEOS", type=Path, help="the folder of the video files")
    parser.add_argument("frames", metavar="FRAMES", type=Path, help="FRAMES/<video>/image_00001.jpg ... are made")
    add = parser.add_argument
    add(
        "--prefix",
        default=Look.prefix,
        help=f"names of the images, from number 1 [default: {Look.prefix}]".replace("%", "%%"),
    )
    known = list(VIDEO_EXTENSIONS)
    add("--accepted_formats", nargs="+", default=known, metavar="EXT", help=f"[default: {' '.join(known)}]")
    add("--begin", type=int, default=0, metavar="N", help="the first video of the sorted listing, from 0 [default: 0]")
    add("--end", type=int, metavar="N", help="the last one, included [default: the last]")
    add("--file_list", type=Path, metavar="FILE", help="only these videos, a name a line, with extension or without")
    add("--frame_rate", type=float, default=Look.frame_rate, metavar="X", help=f"frames a second {native}")
    add("--frame_size", type=int, default=Look.frame_size, metavar="N", help=f"shorter side, never enlarged {native}")
    add("--parallel", action="store_true", help="several videos at once")
    add("--num_workers", type=int, metavar="N", help="with --parallel: how many [default: as many as cores]")
    add("--dry_run", action="store_true", help="say what would be done, and stop")
    add("--num_frames", type=int, metavar="N", help="only the N frames of each video that uniform sampling would pick")
    add("--quality", type=int, default=Look.quality, metavar="N", help="of JPEG, 2 (best) to 31 [default: 2]")
    add("--recursive", action="store_true", help="look into the folders in VIDEOS too; FRAMES nests in the same way")
    add("--clips", type=Path, metavar="FILE", help="an annotation: a folder an entry, cut from its start to its end")
    add("--overwrite", action="store_true", help="extract again what is finished, or was there before")
    add("--time_limit", type=float, default=3600.0, metavar="S", help="seconds for one ffmpeg [default: 3600]")


def request_from(given: Namespace) -> Request:
    """What the flags of `declare` ask for. Raises UserError."""
    looks = {one.name: getattr(given, one.name) for one in fields(Look)}
    taken = (
        "videos",
        "frames",
        "begin",
        "end",
        "file_list",
        "clips",
        "recursive",
        "overwrite",
        "dry_run",
        "time_limit",
    )
    return Request(
        **{name: getattr(given, name) for name in taken},
        look=Look(**looks),
        formats=_formats(given.accepted_formats),
        num_workers=1 if not given.parallel else cores() if given.num_workers is None else given.num_workers,
    )


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _formats(words: list[str]) -> tuple[str, ...]:
    """`.MP4`, `mp4` and `.mp4,.mkv` all mean what they look like."""
    return tuple(name.strip().removeprefix(".").lower() for word in words for name in word.split(",") if name.strip())
