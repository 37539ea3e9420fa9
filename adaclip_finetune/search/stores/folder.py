"""`FolderStore`: the folder of an index as a store, for a copy that is searched elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import THUMBS, VideoIndex
from adaclip_finetune.search.stored import FILE, EmbeddedVideo, IndexInfo, Lines, StoredIndex, read_index, write_index
from adaclip_finetune.search.stores.base import digest_of


class FolderStore(VideoIndex):
    """The index in a folder. Nothing changes on disk before `finish`, which replaces it as a whole."""

    def __init__(self, folder: Path) -> None:
        stored = None
        if (folder / FILE).exists():
            stored = read_index(folder)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: is not an index and not empty; give the name of a new folder")
        self.fingerprint = stored.info.fingerprint if stored else None
        nothing = StoredIndex(
            IndexInfo("", "", {}, ""), np.empty((0, 0), np.float32), Lines(np.empty(0, np.uint8)), np.empty(0, np.int64)
        )
        super().__init__(folder, stored or nothing)
        self._held = {video.row["id"]: video for video in stored.videos()} if stored else {}

    def begin(self, info: IndexInfo, width: int, folder: Path) -> None:
        self._info, self._width, self._source = info, width, folder / THUMBS

    def digests(self) -> dict[str, str]:
        return {name: digest_of(video) for name, video in self._held.items()}

    def upsert(self, videos: Sequence[EmbeddedVideo]) -> None:
        self._held |= {video.row["id"]: video for video in videos}

    def delete(self, ids: Collection[str]) -> None:
        self._held = {name: video for name, video in self._held.items() if name not in ids}

    def finish(self) -> None:
        thumbs, videos = self.folder / THUMBS, [self._held[name] for name in sorted(self._held)]
        thumbs.mkdir(parents=True, exist_ok=True)
        wanted = {name for video in videos for name in video.thumbs()}
        there = {path.name for path in thumbs.iterdir()}
        for name in wanted - there:
            if (self._source / name).is_file():
                shutil.copyfile(self._source / name, thumbs / name)
        vectors = np.array([video.vector for video in videos]).reshape(len(videos), self._width)
        moments = [video.moments for video in videos if video.moments is not None]
        write_index(self.folder, self._info, vectors, [video.row for video in videos], moments)
        for name in there - wanted:
            (thumbs / name).unlink()
        super().__init__(self.folder, read_index(self.folder))
        self.fingerprint = self.info.fingerprint
