"""Files that are whole after a crash or a power cut: written beside their place, flushed, then renamed."""

from __future__ import annotations

import os
from pathlib import Path
from secrets import token_hex


def write_durably(path: Path, content: bytes, shared: bool = False) -> None:
    """There is the old content or the new, never a part. Raises OSError, leaving nothing beside.

    `shared`: other processes may write the same file at the same time; the last one stands.
    """
    part = path.with_name(f".{path.name}.{token_hex(4)}.part") if shared else beside(path)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def beside(path: Path) -> Path:
    """Where something is written before it has its name."""
    return path.with_name(f".{path.name}.part")


def flush_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name == "nt":  # where folders cannot be opened, and renames are durable
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
