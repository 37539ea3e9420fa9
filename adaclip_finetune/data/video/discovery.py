"""Which files are videos: those that are called like one, and any other file that the reader can open."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from adaclip_finetune.data.names import split_extension
from adaclip_finetune.data.video.decoding import BrokenVideo, opened
from adaclip_finetune.data.video.remote import RemotePath
from adaclip_finetune.printable import printable

NUM_EXAMPLES = 5


def has_video_extension(name: str) -> bool:
    """Return whether a file is called like a video, in upper or lower case."""
    return split_extension(name)[1] is not None


def is_video_file(path: Path | RemotePath) -> bool:
    """Return whether a file is called like a video, or can be opened as one whatever it is called."""
    if has_video_extension(path.name):
        return True
    if not path.is_file():  # a pipe would be waited for
        return False
    with suppress(BrokenVideo, OSError), opened(path):
        return True
    return False


def find_videos(folder: Path, recursive: bool = True) -> tuple[list[Path], list[Path]]:
    """Return the video files of a folder, and the other files in it, both sorted.

    Hidden files and folders are left out, and links to folders are not followed. Raises OSError for a folder that
    cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    videos: list[Path] = []
    others: list[Path] = []
    for here, below, names in os.walk(folder, onerror=refuse):
        below[:] = sorted(name for name in below if recursive and not name.startswith("."))
        for path in (Path(here, name) for name in sorted(names) if not name.startswith(".")):
            (videos if is_video_file(path) else others).append(path)
    return videos, others


def describe_unknown_files(others: Sequence[Path]) -> str:
    """Return a line on files that are no videos, such as "1 other file passed over: notes.txt"; "" if none are."""
    if not others:
        return ""
    names = [printable(path.name) for path in others[:NUM_EXAMPLES]] + ["…"] * (len(others) > NUM_EXAMPLES)
    return f"{len(others):,} other file{'s' * (len(others) > 1)} passed over: {', '.join(names)}"
