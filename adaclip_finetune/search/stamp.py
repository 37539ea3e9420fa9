"""By which a video is known to be as it was indexed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Stamp(NamedTuple):
    """Of a file. Of a folder of frames: all of its files' bytes, and the latest change of one of them or of the folder
    itself, which tells when one comes, goes, or gets another name."""

    size: int  # bytes
    mtime_ns: int


def stamp_of(path: Path) -> Stamp:
    """What a file or a folder of frames is like now. Raises OSError."""
    found = path.stat()
    if not path.is_dir():
        return Stamp(found.st_size, found.st_mtime_ns)
    size, latest = 0, found.st_mtime_ns
    with os.scandir(path) as entries:
        for entry in entries:
            image = entry.stat()
            size, latest = size + image.st_size, max(latest, image.st_mtime_ns)
    return Stamp(size, latest)
