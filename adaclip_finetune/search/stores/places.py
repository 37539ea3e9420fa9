"""Opening an index wherever it is, and pushing one to another place.

The folder of an index stays the truth: a store is a copy, which other machines can search. To add one is to write a
class with the methods of `VectorStore`, and a line in `open_index` and `open_store`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.stored import read_index
from adaclip_finetune.search.stores.base import Searchable, VectorStore, digest_of

_AT_ONCE = 500  # videos that are pushed together


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
    model, and for a part of an index.
    """
    index = read_index(source)
    info = index.info
    if info.shard is not None:
        raise UserError(f"{source}: is one part of an index; `adaclip index merge` makes the whole one")
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


def is_milvus(place: str) -> bool:
    """Return whether a place is in Milvus: everything else is a folder."""
    return place.startswith(("milvus://", "milvus+https://"))
