"""The file that stands beside a video's images: what they were made of and how, by which a later run knows them."""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from adaclip_finetune.extract.options import Look

NAME = "manifest.json"
IMAGES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Source:
    """A video file as it was: another size or time of change is another file."""

    name: str
    size: int
    mtime_ns: int

    @staticmethod
    def of(path: Path) -> Source:
        """Raises OSError; for what is no plain file too, since opening a pipe would wait for ever."""
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return Source(path.name, facts.st_size, facts.st_mtime_ns)


@dataclass(frozen=True)
class Manifest:
    """fps and duration (seconds) are the source's; `indices` of the frames in it, where only some were picked."""

    frames: int
    fps: float | None
    duration: float | None
    source: Source
    options: Look
    start: float | None = None
    end: float | None = None
    indices: list[int] | None = None

    def write(self, folder: Path) -> None:
        (folder / NAME).write_bytes(encoded(asdict(self)))


class State(Enum):
    """What a run finds where a video's folder goes."""

    MISSING = "not extracted yet"
    FINISHED = "extracted already"
    SOURCE_CHANGED = "extracted from another file"
    OPTIONS_CHANGED = "extracted with other options"
    NOT_OURS = "not made by this tool"


def state_of(folder: Path, source: Path, look: Look, start: float | None, end: float | None) -> tuple[State, str]:
    """What stands there, and which options differ (in words)."""
    if not os.path.lexists(folder) or _is_empty(folder):
        return State.MISSING, ""
    try:
        content: dict[str, Any] = json.loads((folder / NAME).read_bytes())
        then, count = content["source"], int(content["frames"])
        options = dict(content["options"]) | {"start": content["start"], "end": content["end"]}
    except (OSError, ValueError, KeyError, TypeError):
        return State.NOT_OURS, ""
    now = asdict(look) | {"start": start, "end": end}
    if differ := [
        f"{name} was {options.get(name)}, is {value}" for name, value in now.items() if options.get(name) != value
    ]:
        return State.OPTIONS_CHANGED, ", ".join(differ)
    whole = all((folder / look.image_name(number)).is_file() for number in {1, count})
    try:
        same = then == asdict(Source.of(source))
    except OSError:  # the source has gone; its images have not
        same = True
    if not same or not whole:
        return State.SOURCE_CHANGED, ""
    return State.FINISHED, ""


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and next(folder.iterdir(), None) is None


def holds_only_images(folder: Path) -> str | None:
    """None, or why the folder must not be replaced."""
    if folder.is_symlink():  # replaced itself, never what it leads to
        return None
    if not folder.is_dir():
        return f"{folder} is a file: move it away"
    with os.scandir(folder) as entries:
        for entry in entries:
            ours = entry.name == NAME or entry.name.lower().endswith(IMAGES)
            if not ours or not entry.is_file(follow_symlinks=False):
                return f"{folder} holds {entry.name!r}, which is no image: move it away"
    return None


def encoded(content: Any) -> bytes:
    """JSON, one key a line; names that are not Unicode are spelled as escapes, which every reader of JSON takes."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
