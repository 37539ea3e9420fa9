"""What `adaclip extract` is asked to do: its flags, and which values they accept."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaclip_finetune.errors import UserError

# No folder, no leading dash or dot, one place for the number: ffmpeg reads it as a pattern, and so does training.
_PREFIX = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)?%(0[1-9])?d[A-Za-z0-9_.-]*\.(jpg|jpeg|png)")


def _option(default: Any = None, **flag: Any) -> Any:
    """Declare an option; argparse is told its default, too, and `--help` tells it to the user."""
    if default is not None and default is not False:
        flag["help"] += f" [default: {str(default).replace('%', '%%')}]"
    return field(default=default, metadata={"default": default, **flag})


@dataclass(frozen=True)
class ExtractionOptions:
    """The flags of the command; the metadata are what argparse is told. Raises UserError, which names a flag."""

    videos: Path = field(metadata={"metavar": "VIDEOS", "type": Path, "help": "the folder of the video files"})
    frames: Path = field(metadata={"metavar": "FRAMES", "type": Path, "help": "where to write FRAMES/<video>/"})
    prefix: str = _option("image_%05d.jpg", metavar="NAME", help="names of the images, numbered from 1")
    accepted_formats: Sequence[str] | None = _option(nargs="+", metavar="EXT", help="only files with these extensions")
    begin: int = _option(0, metavar="N", type=int, help="number of the first video in sorted order, from 0")
    end: int | None = _option(metavar="N", type=int, help="number of the last video, which is included")
    file_list: Path | None = _option(metavar="FILE", type=Path, help="only these videos, one name per line")  # noqa: RUF009
    frame_rate: float = _option(-1.0, metavar="X", type=float, help="frames per second; -1: all frames")
    frame_size: int = _option(-1, metavar="N", type=int, help="shorter side, never enlarged; -1: as in the video")
    parallel: bool = _option(False, action="store_true", help="extract several videos at once")
    num_workers: int | None = _option(metavar="N", type=int, help="with --parallel: how many, else one per core")
    dry_run: bool = _option(False, action="store_true", help="print how many videos would be extracted, and stop")
    num_frames: int | None = _option(metavar="N", type=int, help="only the N frames that uniform sampling reads")
    quality: int = _option(2, metavar="N", type=int, help="JPEG quality, from 2 (best) to 31")
    recursive: bool = _option(False, action="store_true", help="search subfolders, too, and nest FRAMES like VIDEOS")
    clips: Path | None = _option(metavar="FILE", type=Path, help="annotation: one folder per entry, cut as it says")  # noqa: RUF009
    overwrite: bool = _option(False, action="store_true", help="extract again what is finished, and replace images")
    time_limit: float = _option(3600.0, metavar="S", type=float, help="seconds per video")

    def __post_init__(self) -> None:
        accepted = {
            "prefix": (_PREFIX.fullmatch(self.prefix), "a name like image_%05d.jpg that ends in .jpg, .jpeg or .png"),
            "frame_rate": (self.frame_rate == -1 or 0 < self.frame_rate <= 1000, "up to 1000, or -1 for all frames"),
            "frame_size": (self.frame_size == -1 or 1 <= self.frame_size <= 16384, "1 to 16384, or -1"),
            "quality": (2 <= self.quality <= 31, "2 (best) to 31 (smallest files)"),
            "num_frames": (self.num_frames is None or self.num_frames >= 1, "at least 1"),
            "begin": (self.begin >= 0, "at least 0"),
            "end": (self.end is None or self.end >= self.begin, "at least --begin; the last video is included"),
            "num_workers": (self.num_workers is None or self.num_workers >= 1, "at least 1"),
            "time_limit": (self.time_limit > 0, "a number of seconds above 0"),
        }
        for name, (is_accepted, words) in accepted.items():
            if not is_accepted:
                raise UserError(f"--{name} {getattr(self, name)}: must be {words}")
        if self.num_frames is not None and self.frame_rate != -1:
            raise UserError("--num_frames chooses among all frames of a video: omit --frame_rate")
        if self.accepted_formats is not None and (self.clips or self.file_list):
            raise UserError("--accepted_formats chooses among all videos: omit it with --file_list and --clips")
        if self.clips and self.file_list:
            raise UserError("--clips names its videos itself: omit --file_list")

    @property
    def workers(self) -> int:
        """How many videos are extracted at once."""
        return (self.num_workers or cores()) if self.parallel else 1

    @property
    def image_options(self) -> dict[str, Any]:
        """Everything but the source that decides which images a video gives; a manifest keeps it."""
        return {key: getattr(self, key) for key in ("prefix", "frame_rate", "frame_size", "num_frames", "quality")}


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
