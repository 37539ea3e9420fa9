"""Writing the file of a pack: in transactions of bounded size, each on the disk when it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import lmdb

from adaclip_finetune.data.pack import (
    CONTENTS,
    Contents,
    VideoRecord,
    check_length,
    digest,
    encoded,
    image_key,
    sealed,
    unsealed,
    video_key,
)

TRANSACTION = 64 << 20  # bytes
ROOM = 1 << 30  # bytes by which LMDB's map grows


class PackWriter:
    """The one writer of a file that nobody reads yet. Use as a context. Every method raises lmdb.Error, and
    BrokenPack if what it goes on with is damaged."""

    def __init__(self, path: Path) -> None:
        """An unfinished file is gone on with."""
        self._environment = lmdb.open(os.fsencode(path), subdir=False, lock=False, map_size=ROOM)
        check_length(path, self._environment)
        self._waiting: list[tuple[bytes, bytes | None]] = []  # key and value; None: to be deleted
        self._size = 0

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._environment.close()

    def record(self, video_id: str) -> VideoRecord | None:
        """Of a finished video."""
        with self._environment.begin() as transaction:
            value = transaction.get(video_key(video_id))
        if value is None:
            return None
        return VideoRecord(**json.loads(unsealed(video_key(video_id), bytes(value), "a record")))

    def add(self, record: VideoRecord, images: Iterable[bytes]) -> None:
        """Take a video in, in place of what stands there. If `images` raises, the video has no record."""
        self._put(video_key(record.video_id), None)
        for index, content in enumerate(images):
            self._put(image_key(record.video_id, index), content)
        self._put(video_key(record.video_id), encoded(record))

    def finish(self, records: Iterable[VideoRecord], contents: Contents) -> None:
        """Remove what does not belong to these videos, and declare the pack finished."""
        self._flush()
        for key in list(self._strays({digest(record.video_id): record.images for record in records})):
            self._put(key, None)
        self._put(CONTENTS, encoded(contents))
        self._flush()

    def _put(self, key: bytes, content: bytes | None) -> None:
        self._waiting.append((key, None if content is None else sealed(key, content)))
        self._size += len(key) + len(content or b"")
        if self._size >= TRANSACTION:
            self._flush()

    def _flush(self) -> None:
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, value in self._waiting:
                        if value is None:
                            transaction.delete(key)
                        else:
                            transaction.put(key, value)
                break
            except lmdb.MapFullError:
                size = self._environment.info()["map_size"]
                self._environment.set_mapsize(size + max(ROOM, size // 4))
        self._waiting.clear()
        self._size = 0

    def _strays(self, images: dict[bytes, int]) -> Iterator[bytes]:
        """Keys of videos that are not among these, and of images beyond what these have."""
        with self._environment.begin() as transaction, transaction.cursor() as cursor:
            found = cursor.first()
            while found:
                key = bytes(cursor.key())
                kind, video = key[:1], key[1:33]
                if kind == b"i" and int.from_bytes(key[33:], "big") < images.get(video, 0):
                    found = cursor.set_range(kind + video + images[video].to_bytes(4, "big"))
                    continue
                if kind == b"i" or (kind == b"v" and video not in images):
                    yield key
                found = cursor.next()
