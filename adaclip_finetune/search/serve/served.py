"""What is served: the model, and the videos of an index and their pictures by key.

A request names a key, never a path. A file is given out only if the index names it and it has not changed since it was
indexed.
"""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from fastapi import HTTPException
from torch import Tensor

from adaclip_finetune.config import Config
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FrameError, FrameStore
from adaclip_finetune.data.packed_frames import PackedFrames
from adaclip_finetune.data.video.remote import RemotePath
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.collection import VideoFiles
from adaclip_finetune.search.cut import CutFailed, check_unchanged, clip_name, cut, has_file
from adaclip_finetune.search.index import Hit, IndexedVideo
from adaclip_finetune.search.pictures import thumbnail
from adaclip_finetune.search.stores.base import Searchable

if TYPE_CHECKING:
    from adaclip_finetune.search.search_model import SearchModel

T = TypeVar("T")

_REMEMBERED = 100  # videos whose pictures are kept in memory


class ModelThread:
    """Loads a model, while the page is already served, and calls functions with it, one at a time.

    `message` says why loading failed.
    """

    def __init__(self, load: Callable[[], SearchModel]) -> None:
        self.state: Literal["loading", "ready", "failed"] = "loading"
        self.message: str | None = None
        self._load = load
        self._model: SearchModel | None = None
        self._thread = ThreadPoolExecutor(1, "model")

    def start(self) -> None:
        """Begin to load the model."""
        self._thread.submit(self._start)

    async def run(self, function: Callable[[SearchModel], T]) -> T:
        """Return what the function returns for the model. Raise HTTPException (503) while there is none."""
        if self._model is None:
            raise HTTPException(503, self.message or "the model is still being loaded", {"retry-after": "2"})
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, self._model)

    def stop(self) -> None:
        """End the thread, when it has done what it was asked for."""
        self._thread.shutdown()

    def _start(self) -> None:
        started = time.monotonic()
        try:
            self._model = self._load()
            self.state = "ready"
            print(f"the model is ready after {time.monotonic() - started:.1f} s", flush=True)
        except Exception as error:  # whatever it is, the page must not wait for ever
            if not isinstance(error, UserError):
                traceback.print_exc()
            self.message, self.state = str(error) or repr(error), "failed"
            stopped = "Nothing can be searched until `adaclip serve` is started again; Ctrl-C stops it"
            print(f"adaclip: error: {self.message}\n{stopped}", file=sys.stderr, flush=True)


class Searches:
    """Searches for queries that the model encodes. Those that wait at the same time and differ in nothing else are done
    together, which takes less time than one after another."""

    def __init__(self, model: ModelThread) -> None:
        self._model = model
        self._waiting: dict[str, list[Tensor]] = {}  # the queries of searches that begin soon
        self._soon: dict[str, asyncio.Task[list[list[Hit]]]] = {}

    async def hits(self, encode: Callable[[SearchModel], Tensor], find: partial[list[list[Hit]]]) -> list[Hit]:
        """Return what `find` finds for the query (1, D) that `encode` makes. Raise what they raise.

        Two searches differ in nothing else if `repr` says the same of their `find`.
        """
        query, key = await self._model.run(encode), repr(find)
        if key not in self._soon:
            self._waiting[key], self._soon[key] = [], asyncio.create_task(self._search(key, find))
        queries, search = self._waiting[key], self._soon[key]
        queries.append(query)
        place = len(queries) - 1
        return (await asyncio.shield(search))[place]

    async def _search(self, key: str, find: partial[list[list[Hit]]]) -> list[list[Hit]]:
        try:
            await self._model.run(lambda _: None)  # until what was asked before has been encoded
        finally:
            queries = self._waiting.pop(key)
            del self._soon[key]
        return await self._model.run(lambda _: find(torch.cat(queries)))


class ServedVideos:
    """The videos of an index, by key. All methods raise HTTPException (404) for a key that the index lacks, and for
    files that are missing or have changed."""

    def __init__(self, index: Searchable) -> None:
        self.index = index
        self._pictures = lru_cache(_REMEMBERED)(self._read_pictures)

    def file(self, key: str) -> Path | RemotePath:
        """Return the video file of a key."""
        video = self._find(key)
        if not has_file(video):
            raise HTTPException(404, f"{video.id}: the index was made of frames; there is no video file")
        _check_unchanged(video)
        return video.path

    def poster(self, key: str) -> Path:
        """Return the JPEG of the frame with the greatest weight."""
        thumb = self._find(key).thumb
        if thumb.is_symlink() or not thumb.is_file():
            raise HTTPException(404, "this video has no picture")
        return thumb

    def moment_poster(self, key: str, number: int) -> Path:
        """Return the JPEG of the best frame of one of the windows of a video, counted from 0."""
        video, picture = self._find(key), self.index.moment_picture(key, number)
        if picture is None:
            raise HTTPException(404, f"{video.id}: has no such moment")
        return picture

    def cut(self, key: str, start: float, end: float, exact: bool, folder: Path) -> Path:
        """Write a part of a video into `folder`, and return the file."""
        video = self._find(key)
        target = folder / clip_name(video, start, end, exact)
        try:
            cut(video, start, end, target, exact)
        except CutFailed as error:
            raise HTTPException(404, str(error)) from error
        return target

    def frame(self, key: str, number: int) -> bytes:
        """Return a JPEG of one of the frames that the vector was made of, counted from 0."""
        video = self._find(key)
        if number >= len(video.frames):
            raise HTTPException(404, f"{video.id}: has {len(video.frames)} frames here")
        _check_unchanged(video)
        return self._pictures(video)[number]

    def _find(self, key: str) -> IndexedVideo:
        video = self.index.find(key)
        if video is None:
            raise HTTPException(404, "the index does not have this video; search again")
        return video

    def _read_pictures(self, video: IndexedVideo) -> list[bytes]:
        """All pictures of a video at once, which is one pass over its file."""
        try:
            store, name = self._store(video)
            return [thumbnail(frame) for frame in store.read(name, [frame.index for frame in video.frames])]
        except (FrameError, UserError, LookupError) as error:
            raise HTTPException(404, f"{video.id}: its frames cannot be read ({error})") from error

    def _store(self, video: IndexedVideo) -> tuple[FrameStore, str]:
        """Return the store of a video's frames, and the name of the video there."""
        if has_file(video) or isinstance(video.path, RemotePath):
            return VideoFiles(video.path.parent, {video.id: video.path.name}), video.id
        if video.path.is_dir():
            img_tmpl = self.index.info.settings.get("img_tmpl", Config.model_fields["img_tmpl"].default)
            return FrameFolder(video.path.parent, str(img_tmpl)), video.path.name
        return PackedFrames(video.path), video.id


def _check_unchanged(video: IndexedVideo) -> None:
    try:
        check_unchanged(video)
    except CutFailed as error:
        raise HTTPException(404, str(error)) from error
