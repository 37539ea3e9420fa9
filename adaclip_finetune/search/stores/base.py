"""`VectorStore`, the protocol of places where the vectors of an index can be searched, and `push`, which fills one.

The folder of an index stays the truth: a store is a copy that other machines can search. To add one is to write a class
with these methods and a line in `open_store`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import (
    EmbeddedVideo,
    Hit,
    IndexedVideo,
    IndexInfo,
    VideoIndex,
    read_index,
)
from adaclip_finetune.search.transcripts import FoundLine

_AT_ONCE = 500  # videos that are pushed together


class Searchable(Protocol):
    """An index that can be searched, wherever it is. `VideoIndex` describes the methods."""

    info: IndexInfo
    width: int
    fuses: bool  # whether `search` takes the lines of transcripts
    distinct: int
    folder: Path  # of the index, or of the one that it is a copy of, where its pictures lie; it need not be there

    @property
    def place(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def moments(self) -> Sized | None: ...

    def __len__(self) -> int: ...

    def search(
        self,
        vectors: Any,
        k: int,
        ranks: slice = ...,
        score: Literal["whole", "moment"] | None = ...,
        where: Sequence[str] = ...,
        lines: Sequence[Mapping[str, FoundLine]] | None = ...,
    ) -> list[list[Hit]]: ...

    def search_moments(
        self, vectors: Any, k: int, ranks: slice = ..., where: Sequence[str] = ...
    ) -> list[list[Hit]]: ...

    def ranked_by(self, score: Literal["whole", "moment"] | None = ...) -> Literal["whole", "moment"]: ...

    def count(self, where: Sequence[str] = ...) -> int: ...

    def need_moments(self) -> Sized: ...

    def nearest(self, vector: NDArray[np.float32], k: int) -> tuple[list[IndexedVideo], NDArray[np.float32]]: ...

    def find(self, key: str) -> IndexedVideo | None: ...

    def moment_picture(self, key: str, number: int) -> Path | None: ...


class VectorStore(Searchable, Protocol):
    """A place that holds videos, by id, and can be searched. What it holds survives when the process is killed."""

    @property
    def fingerprint(self) -> str | None:
        """Return the fingerprint of the model of its vectors; None if nothing has been stored yet."""

    def begin(self, info: IndexInfo, width: int, folder: Path) -> None:
        """Make the place ready for vectors of this width, from the index in a folder. Raise UserError."""

    def digests(self) -> dict[str, str]:
        """Return the id of each video that is stored completely, with its `digest_of`."""

    def upsert(self, videos: Sequence[EmbeddedVideo]) -> None:
        """Store videos, with their moments, replacing those of the same ids."""

    def delete(self, ids: Collection[str]) -> None:
        """Remove videos, with their moments."""

    def finish(self) -> None:
        """Note that everything has been stored, so that it can be searched."""


class Pushed(NamedTuple):
    """What `push` did: numbers of videos."""

    stored: int
    kept: int
    deleted: int


def open_index(place: str) -> Searchable:
    """Return the index in a folder, or the one that was pushed to Milvus. Raise UserError."""
    if not is_milvus(place):
        return VideoIndex.load(place)
    from adaclip_finetune.search.stores.milvus import MilvusStore

    store = MilvusStore(place)
    store.open()
    return store


def open_store(place: str, hnsw: bool = False) -> VectorStore:
    """Return a place that is to be filled, which need not exist: in Milvus, or a folder. Raise UserError."""
    if is_milvus(place):
        from adaclip_finetune.search.stores.milvus import MilvusStore

        return MilvusStore(place, hnsw, make=True)
    if hnsw:
        raise UserError("--hnsw belongs to milvus://")
    from adaclip_finetune.search.stores.folder import FolderStore

    return FolderStore(Path(place))


def push(source: Path, store: VectorStore) -> Pushed:
    """Store the videos of an index that are new or changed, and delete those that it no longer has.

    What was stored when it is interrupted is not stored again. Raise UserError if the store has vectors of another
    model.
    """
    index = read_index(source)
    info = index.info
    if store.fingerprint not in (None, info.fingerprint):
        raise UserError(
            f"{store.place}: holds vectors of another model ({store.info.run}, fingerprint "
            f"{store.info.fingerprint[:12]}; that of {source} has {info.fingerprint[:12]}), and vectors of two models "
            "cannot be compared: give another name"
        )
    store.begin(info, index.vectors.shape[1], source.absolute())
    there, videos = store.digests(), index.videos()
    new = [video for video in videos if there.get(video.row["id"]) != digest_of(video)]
    for start in range(0, len(new), _AT_ONCE):
        store.upsert(new[start : start + _AT_ONCE])
    gone = there.keys() - {video.row["id"] for video in videos}
    store.delete(gone)
    store.finish()
    return Pushed(len(new), len(videos) - len(new), len(gone))


def digest_of(video: EmbeddedVideo) -> str:
    """Return a digest of all that is stored of a video, 32 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(video.row).encode() + video.vector.astype(np.float32).tobytes())
    if video.moments is not None:
        digest.update(json.dumps(video.moments.rows).encode() + video.moments.vectors.astype(np.float32).tobytes())
    return digest.hexdigest()[:32]


def is_milvus(place: str) -> bool:
    """Return whether a place is in Milvus: everything else is a folder."""
    return place.startswith(("milvus://", "milvus+https://"))
