"""Write files that are whole after a crash: under a temporary name first, flushed to disk, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes the place of `path` if the block succeeds.

    Readers see the old file or the new one, never a part of it, and the new file has the permissions of the user's
    umask whatever library writes it. If the block fails, the temporary file is deleted. Set `shared` if several
    processes may write the same file at the same time; the last one wins.
    """
    part = path.with_name(f".{path.name}.{token_hex(4)}.part") if shared else beside(path)
    part.unlink(missing_ok=True)
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_durably(path: Path, content: bytes, shared: bool = False) -> None:
    """Write `content` to `path` as `replacing` does. Raise OSError and leave nothing behind if that fails."""
    with replacing(path, shared) as part:
        part.write_bytes(content)


def beside(path: Path) -> Path:
    """Return the temporary path under which `path` is written."""
    return path.with_name(f".{path.name}.part")


def flush_folder(path: Path) -> None:
    """Flush the names in a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
