"""Video files in object storage or on a server, read through fsspec: `s3://bucket/videos/beach.mp4`.

Only the ranges that are needed are requested, a mebibyte at a time; nothing is written to a disk.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from adaclip_finetune.errors import UserError

_BLOCK = 2**20  # bytes
_BLOCKS = 64  # that a process remembers
_URL = re.compile(r"[A-Za-z][\w+.-]*(::[\w+.-]+)*://")
_CHANGED = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")  # as file systems call it


class RemoteStat(NamedTuple):
    """Size and time of change, under the names that `Path.stat` gives them."""

    st_size: int  # bytes
    st_mtime_ns: int  # where the storage has no times, a number that changes with the file's ETag


class RemotePath(PurePosixPath):
    """The URL of a file or folder. It has those methods of `Path` that the reading of videos needs."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def stat(self) -> RemoteStat:
        """Return size and time of change. Raise OSError."""
        return _stat(_call("info", self))

    def is_file(self) -> bool:
        """Return whether there is a file. Raise OSError if that cannot be asked."""
        return bool(_call("isfile", self))

    def is_dir(self) -> bool:
        """Return False: only files are addressed by a URL."""
        return False

    def open(self, mode: str = "rb") -> io.BufferedIOBase:
        """Open the file for reading. Raise OSError."""
        assert mode == "rb"
        return io.BufferedReader(_RemoteReader(self), 2**16)

    def read_range(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`. Raise OSError."""
        content: bytes = _call("cat_file", self, start=start, end=end)
        return content

    def files(self) -> dict[str, RemoteStat]:
        """Return the files below this folder, except hidden ones, by their path relative to it. Raise OSError."""
        filesystem, inner = _filesystem(self)
        start = len(inner.rstrip("/")) + 1
        filesystem.invalidate_cache()  # an earlier listing of this process may be out of date
        found: dict[str, Any] = _call("find", self, detail=True)
        names = {path[start:]: facts for path, facts in sorted(found.items())}
        return {name: _stat(facts) for name, facts in names.items() if not re.search(r"(^|/)(\.|$)", name)}


def is_url(text: str) -> bool:
    """Return whether a text is a URL such as s3://bucket/videos."""
    return _URL.match(text) is not None


def path_of(text: str) -> Path | RemotePath:
    """Return a path, or a URL as a RemotePath; file:// is a path."""
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return RemotePath(text) if is_url(text) else Path(text)


class _RemoteReader(io.RawIOBase):
    """A file that is read in blocks, which other readers of the same file find in memory."""

    def __init__(self, path: RemotePath) -> None:
        self._path, self._stat, self._at = path, path.stat(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._stat.st_size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        number, start = divmod(self._at, _BLOCK)
        content = b""
        if self._at < self._stat.st_size:
            content = _block(self._path, self._stat, number)[start : start + len(buffer)]
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


@lru_cache(_BLOCKS)
def _block(path: RemotePath, stat: RemoteStat, number: int) -> bytes:
    return path.read_range(number * _BLOCK, min((number + 1) * _BLOCK, stat.st_size))


def _filesystem(path: RemotePath) -> tuple[Any, str]:
    """Return the file system of a URL, as this process and not one that it was forked from has it, and the path in it.

    Raise UserError if no file system is known for it, or a package that it needs is missing.
    """
    from fsspec.core import url_to_fs

    scheme = str(path).split("://")[0].rpartition("::")[2]
    try:
        filesystem, inner = url_to_fs(str(path))
    except ImportError as error:
        extra = "pip install 'adaclip-finetune[s3]'" if scheme in ("s3", "s3a") else error
        raise UserError(f"{path}: reading {scheme}:// needs another package: {extra}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return filesystem, inner


def _call(method: str, path: RemotePath, **options: Any) -> Any:
    """Call a method of the file system. Whatever the storage's library raises becomes an OSError."""
    filesystem, inner = _filesystem(path)
    try:
        return getattr(filesystem, method)(inner, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(2, "there is no such file or folder", str(path)) from error
    except Exception as error:
        raise OSError(5, f"{type(error).__name__}: {error}", str(path)) from error


def _stat(facts: Mapping[str, Any]) -> RemoteStat:
    changed = next((facts[name] for name in _CHANGED if facts.get(name) is not None), None)
    if isinstance(changed, datetime):
        changed = changed.timestamp()
    if not isinstance(changed, int | float):
        tag = str(facts.get("ETag") or facts.get("etag") or facts.get("blob_id") or changed)
        changed = int(hashlib.sha256(tag.encode()).hexdigest()[:12], 16) / 1e9
    return RemoteStat(int(facts.get("size") or 0), round(changed * 1e6) * 1000)
