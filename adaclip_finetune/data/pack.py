"""A pack: the images of many videos in one LMDB file, byte for byte as in their folders, each with its checksum.

    pack                           what the file is and holds (JSON), written last: without it the file is no pack
    v<SHA-256 of the id>           a video: its id, its images, what its folder looked like (JSON)
    i<SHA-256 of the id><number>   an image; its number counts from 0, in 4 bytes, the highest first

Ids are hashed because a key of LMDB has at most 511 bytes. In front of each value stand 4 bytes: the CRC-32 of key and
content, which is compared whenever the value is read. Nothing writes to a pack that has its name, so that readers need
no locks and any number of them may have it open.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb

from adaclip_finetune.errors import UserError

FORMAT = "frames of videos"
VERSION = 1
CONTENTS = b"pack"
NO_PACK = "is no pack of frames; adaclip pack makes one"


class BrokenPack(Exception):
    """The pack cannot give what was asked of it; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class VideoRecord:
    """A video as it was packed. `folder` stands for the names, sizes and times of change of its images."""

    video_id: str
    images: int
    size: int  # of all images, in bytes
    folder: str


@dataclass(frozen=True)
class Contents:
    """What the whole pack holds; `size` in bytes of images."""

    img_tmpl: str
    videos: int
    images: int
    size: int
    format: str = FORMAT
    version: int = VERSION


class Pack:
    """A finished pack, to be read. It may be copied into other processes, by fork or by pickle, and used in several
    threads: each process opens the file for itself, once."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file is not there, or is no finished pack of this version."""
        self.path = path
        self._pid = 0  # of the process that opened the environment
        self._environment: lmdb.Environment | None = None
        try:
            self.contents = self._read_contents()
        except (BrokenPack, OSError) as error:
            raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pid": 0, "_environment": None}

    def record(self, video_id: str) -> VideoRecord | None:
        """None if the pack does not hold the video. Raises BrokenPack, OSError."""
        content = self._values([(video_key(video_id), "what it says of the video")])[0]
        return None if content is None else VideoRecord(**json.loads(content))

    def images(self, video_id: str, indices: Sequence[int]) -> list[bytes]:
        """The files of the images with these indices, from 0. Raises BrokenPack (a checksum is wrong, …), OSError."""
        contents = self._values([(image_key(video_id, index), self.image_name(index)) for index in indices])
        images = []
        for index, content in zip(indices, contents, strict=True):
            if content is None:
                raise BrokenPack(f"{self.image_name(index)} is not in it, though it should be; pack anew")
            images.append(content)
        return images

    def image_name(self, index: int) -> str:
        """What the image was called in its folder."""
        return self.contents.img_tmpl.format(index + 1)

    def _values(self, named_keys: Sequence[tuple[bytes, str]]) -> list[bytes | None]:
        """The contents under these keys, which a BrokenPack calls by the names given; None where there is none."""
        try:
            with self._opened().begin() as transaction:
                values = [transaction.get(key) for key, _ in named_keys]
        except lmdb.Error as error:
            raise BrokenPack(f"it is damaged ({error}); pack anew") from None
        return [
            None if value is None else unsealed(key, bytes(value), name)
            for (key, name), value in zip(named_keys, values, strict=True)
        ]

    def _opened(self) -> lmdb.Environment:
        if self._environment is None or self._pid != os.getpid():
            self._environment, self._pid = _environment_of(self.path), os.getpid()
        return self._environment

    def _read_contents(self) -> Contents:
        content = self._values([(CONTENTS, "what it says of itself")])[0]
        if content is None:
            raise BrokenPack("is an LMDB file, but no finished pack of frames; adaclip pack makes one")
        fields = json.loads(content)
        if (fields["format"], fields["version"]) != (FORMAT, VERSION):
            found = f"version {fields['version']} of {fields['format']}"
            raise BrokenPack(f"is {found}; this program reads version {VERSION} of {FORMAT}: pack anew")
        return Contents(**fields)


def check_length(path: Path, environment: lmdb.Environment) -> None:
    """Raises BrokenPack if the file is cut off: LMDB maps it into memory, and would die of a page that is not there."""
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if (size := path.stat().st_size) < needed:
        raise BrokenPack(f"is cut off, {size} of {needed} bytes are there: copy it again, or pack anew")


def video_key(video_id: str) -> bytes:
    """Where the record of a video stands."""
    return b"v" + digest(video_id)


def image_key(video_id: str, index: int) -> bytes:
    """Where an image stands; those of a video follow each other."""
    return b"i" + digest(video_id) + index.to_bytes(4, "big")


def digest(video_id: str) -> bytes:
    """32 bytes for an id of any length."""
    return hashlib.sha256(video_id.encode()).digest()


def sealed(key: bytes, content: bytes) -> bytes:
    """The value that is stored: the content behind a checksum that tells of its place, too."""
    return zlib.crc32(content, zlib.crc32(key)).to_bytes(4, "big") + content


def unsealed(key: bytes, value: bytes, name: str) -> bytes:
    """The content of a value. Raises BrokenPack, with `name`, if the checksum is not that of key and content."""
    content = value[4:]
    if zlib.crc32(content, zlib.crc32(key)).to_bytes(4, "big") != value[:4]:
        raise BrokenPack(f"{name} is damaged (its checksum does not match); pack anew")
    return content


def encoded(record: VideoRecord | Contents) -> bytes:
    """A record as it is stored."""
    return json.dumps(asdict(record), ensure_ascii=False).encode()


# LMDB refuses to open a file twice in a process, and two splits may name the same one. What a fork brought along is
# another process's. The locks are by process because one may be held elsewhere at the moment of a fork.
_ENVIRONMENTS: WeakValueDictionary[tuple[int, int, int], lmdb.Environment] = WeakValueDictionary()
_LOCKS: dict[int, threading.Lock] = {}


def _environment_of(path: Path) -> lmdb.Environment:
    """The only environment of this file in this process. Raises OSError, BrokenPack."""
    facts, process = path.stat(), os.getpid()
    key = (process, facts.st_dev, facts.st_ino)
    with _LOCKS.setdefault(process, threading.Lock()):
        environment = _ENVIRONMENTS.get(key)
        if environment is None:
            for other, inherited in list(_ENVIRONMENTS.items()):
                if other[1:] == key[1:]:
                    inherited.close()
            # With readahead: the images of a video lie side by side. Without it each page of them is fetched by itself,
            # and the cold reads of scripts/bench/pack.py took eight times as long.
            environment = _open(path)
            _ENVIRONMENTS[key] = environment
        return environment


def _open(path: Path) -> lmdb.Environment:
    """Raises OSError, and BrokenPack if it is no pack, or not whole."""
    if path.stat().st_size == 0:
        raise BrokenPack(NO_PACK)
    try:
        environment = lmdb.open(os.fsencode(path), subdir=False, readonly=True, create=False, lock=False)
    except (lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError):
        raise BrokenPack(NO_PACK) from None
    except lmdb.Error as error:  # the system's reason, which is none of the file's
        raise OSError(f"cannot be opened: {error.reason}") from None
    try:
        check_length(path, environment)
    except BrokenPack:
        environment.close()
        raise
    return environment
