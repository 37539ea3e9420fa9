"""Making an index: embed the videos that are new or changed, keep the others, and write all of them."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adaclip_finetune.config.roles import names_with
from adaclip_finetune.data.dataset import GalleryDataset, VideoReader
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.loader import GalleryLoader
from adaclip_finetune.data.readable import find_unreadable, listing
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import FolderLock
from adaclip_finetune.search.collection import CollectionVideo, VideoCollection
from adaclip_finetune.search.nearest import FaissIndex, measure_recall
from adaclip_finetune.search.pictures import thumbnail
from adaclip_finetune.search.search_model import SearchModel, WeightedFrames
from adaclip_finetune.search.storage import (
    MARK,
    PARTS,
    THUMBS,
    EmbeddedVideo,
    IndexInfo,
    Recall,
    StoredIndex,
    finish_move,
    is_index,
    read_index,
    read_parts,
    write_index,
    write_part,
)
from adaclip_finetune.training.memory import memory_explained


@dataclass(frozen=True)
class IndexingReport:
    """What `index_videos` did."""

    embedded: int  # videos
    seconds: float  # that checking and embedding them took
    kept: int  # videos that were in the index and have not changed
    broken: dict[str, str]  # id → why the video cannot be read
    vanished: list[str]  # ids of indexed videos that the collection lacks; dropped if `sync`
    count: int  # videos that are in the index now
    info: IndexInfo


def index_videos(
    model: SearchModel,
    collection: VideoCollection,
    folder: Path,
    *,
    kind: Literal["flat", "hnsw"] | None = None,
    dtype: Literal["float32", "float16"] | None = None,
    sync: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> IndexingReport:
    """Write the index of a collection into `folder`, or update the one that is there.

    `kind` and `dtype` default to those of the index that is there, else flat and float32. With `sync`, videos that the
    collection lacks are dropped. `settings` are those with which the model was loaded. Raise UserError; batches that
    were finished until then are kept, and the same call continues from there.
    """
    model.refuse_query_dependent()
    was_there = folder.exists()
    _claim(folder)
    lock = FolderLock(folder)
    try:
        lock.take()
        try:
            finish_move(folder)
            (folder / THUMBS).mkdir(exist_ok=True)
            old = read_index(folder) if is_index(folder) else None
            info = _info(model, collection, old.info if old else None, settings or {})
            if old is not None:
                _check_same(folder, old.info, info, dtype, sync)
            info = replace(info, kind=kind or info.kind, dtype=dtype or info.dtype)
            return _update(model, collection, folder, old, info, sync)
        finally:
            lock.release()
            if not was_there:
                _remove_if_empty(folder)
    except OSError as error:
        raise UserError(f"{folder}: {error}. Finished batches are kept; the same command continues") from error


def _update(
    model: SearchModel,
    collection: VideoCollection,
    folder: Path,
    old: StoredIndex | None,
    info: IndexInfo,
    sync: bool,
) -> IndexingReport:
    # Finished batches are used again only for the same model, videos and names of frames.
    of = json.dumps([model.fingerprint, info.source, info.root, collection.img_tmpl])
    parts = {video.row["id"]: video for video in read_parts(folder, of)}
    known = {video.row["id"]: video for video in (old.videos() if old else ())} | parts
    same_frames = old is None or collection.img_tmpl in (None, old.info.settings.get("img_tmpl"))
    unchanged = {
        video.id
        for video in collection.videos
        if (found := (known if same_frames else parts).get(video.id))
        and (found.row["size"], found.row["mtime_ns"]) == video.stamp
        and (folder / THUMBS / found.row["thumb"]).exists()
    }
    nothing_dropped = "; nothing is dropped" if known else ""
    if not (collection.videos or collection.broken):
        raise UserError(f"{collection.name}: holds no video{nothing_dropped}")
    started = time.monotonic()
    new = [video.id for video in collection.videos if video.id not in unchanged]
    broken = collection.broken | find_unreadable(collection.store, new, model.config.num_workers)
    readable = [video for video in collection.videos if video.id not in unchanged and video.id not in broken]
    if not unchanged and not readable:
        raise UserError(f"{collection.name}: none of its videos can be read{nothing_dropped}:\n{listing(broken)}")
    fresh: dict[str, EmbeddedVideo] = {}
    for batch, failed in _embed(model, collection, readable, folder / THUMBS):
        broken |= failed
        if batch:
            write_part(folder, of, batch)
        fresh |= {video.row["id"]: video for video in batch}
    seconds = time.monotonic() - started

    result = {}
    for video in collection.videos:
        if video.id in fresh or video.id in unchanged:
            row, vector = fresh.get(video.id) or known[video.id]
            # The folder may have moved, and captions may have been added, since the video was embedded.
            result[video.id] = EmbeddedVideo(row | {"path": str(video.path), "captions": list(video.captions)}, vector)
    ids = {video.id for video in collection.videos}
    vanished = [name for name in known if name not in ids]
    if not sync:
        result |= {name: known[name] for name in vanished}
    info = _write(model, folder, list(result.values()), old, info)
    return IndexingReport(len(fresh), seconds, len(unchanged), broken, vanished, len(result), info)


def _embed(
    model: SearchModel, collection: VideoCollection, videos: Sequence[CollectionVideo], thumbs: Path
) -> Iterator[tuple[list[EmbeddedVideo], dict[str, str]]]:
    """Yield batches of embedded videos, whose thumbnails are written, and the videos that failed: id → reason."""
    by_id = {video.id: video for video in videos}
    dataset = GalleryDataset(list(by_id), VideoReader(collection.store, model.config, model.model.views()))
    bar = tqdm(total=len(by_id), desc="embedding", unit="video", leave=False, disable=None)
    with closing(GalleryLoader(dataset, model.config)) as loader, ThreadPoolExecutor(2) as pool, bar:
        for collated in loader.read(range(len(loader))):
            failed = {error.video_id: f"{error.path}: {error.reason}" for error in collated.failures}
            embedded = []
            if collated.videos is not None:
                with memory_explained(model.config):
                    vectors, weighted = model.embed(collated.videos)
                if not vectors.isfinite().all():
                    raise UserError(f"{model.source}: its vectors are not finite; the weights have probably diverged")
                batch = [by_id[name] for name in collated.videos.video_ids]
                rows = pool.map(lambda given: _row(collection, thumbs, *given), zip(batch, weighted, strict=True))
                for row, vector in zip(rows, vectors.numpy(), strict=True):
                    if isinstance(row, FrameError):
                        failed[row.video_id] = row.reason
                    else:
                        embedded.append(EmbeddedVideo(row, vector))
            yield embedded, failed
            bar.update(len(embedded) + len(failed))


def _row(
    collection: VideoCollection, thumbs: Path, video: CollectionVideo, weighted: WeightedFrames
) -> dict[str, Any] | FrameError:
    """The row of videos.jsonl; the thumbnail comes from the store that the model's frames come from."""
    try:
        duration, times = collection.times(video, weighted.frames)
        best = weighted.frames[weighted.best] if weighted.frames else 0
        picture = thumbnail(collection.store.read(video.id, [best])[0])
    except FrameError as error:
        return error
    name = f"{hashlib.sha256(repr((video.id, video.stamp, best)).encode()).hexdigest()[:20]}.jpg"
    write_durably(thumbs / name, picture)
    frames = zip(weighted.frames, times, weighted.weights, strict=True)
    return {
        "id": video.id,
        "path": str(video.path),
        "size": video.stamp.size,
        "mtime_ns": video.stamp.mtime_ns,
        "duration": duration,
        "captions": list(video.captions),
        "frames": [{"index": index, "time": time, "weight": round(weight, 6)} for index, time, weight in frames],
        "best": weighted.best,
        "thumb": name,
    }


def _write(
    model: SearchModel, folder: Path, videos: list[EmbeddedVideo], old: StoredIndex | None, info: IndexInfo
) -> IndexInfo:
    """Write the index, unless it would be the same as the old one; `adaclip serve` loads it again whenever it is
    written. Return what index.json says."""
    rows = [video.row for video in videos]
    exact = np.array([video.vector for video in videos], np.float32).reshape(len(videos), model.width)
    vectors, graph = exact.astype(info.dtype), None
    if (
        old is not None
        and (info.kind, info.dtype) == (old.info.kind, old.info.dtype)
        and np.array_equal(vectors, old.vectors)
        and (info.kind == "flat" or old.graph is not None)
    ):
        info, graph = replace(info, recall=old.info.recall), old.graph
        if rows == old.rows and replace(info, changed=old.info.changed) == old.info:
            info = old.info
    else:
        index = FaissIndex.build(vectors, info.kind)
        graph = index.dump() if info.kind == "hnsw" else None
        info = replace(info, recall=_recall(model, videos, exact, index, info, old))
    if old is None or info is not old.info:
        write_index(folder, info, vectors, rows, graph)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    thumbs = {row["thumb"] for row in rows}
    for path in (folder / THUMBS).glob("*.jpg"):
        if path.name not in thumbs:
            path.unlink(missing_ok=True)
    return info


def _recall(
    model: SearchModel,
    videos: list[EmbeddedVideo],
    exact: NDArray[np.float32],
    index: FaissIndex,
    info: IndexInfo,
    old: StoredIndex | None,
) -> Recall | None:
    """Measure what an approximate index costs. What rounding to float16 cost can only be measured while the vectors are
    still there in float32; later the first figure is kept."""
    if (info.kind, info.dtype) == ("flat", "float32"):
        return None
    rounded = sum(video.vector.dtype == np.float16 for video in videos)
    if info.kind == "flat" and rounded == len(videos):
        return old.info.recall if old and old.info.kind == "flat" else None
    captions = [text for video in videos for text in video.row["captions"]]
    measured = measure_recall(index, exact, captions, model.encode_text)
    by = f"exact search, {rounded} of {len(videos)} vectors being float16 already" if rounded else "exact float32"
    return None if measured is None else Recall(measured[0], by, measured[1], len(videos))


def _claim(folder: Path) -> None:
    """Make the folder of the index. Everything in it may later be replaced or deleted, so it must be an index already,
    or empty. Raise UserError."""
    try:
        folder.mkdir(exist_ok=True)
        if not (is_index(folder) or (folder / MARK).exists()):
            if any(not path.name.startswith((".lock-", "lock.json")) for path in folder.iterdir()):
                raise UserError(f"-o {folder}: is not an index and not empty; give the name of a new folder")
            (folder / MARK).touch()
    except OSError as error:
        raise UserError(f"-o {folder}: cannot be made ({error.strerror})") from error


def _remove_if_empty(folder: Path) -> None:
    """Leave nothing behind if indexing was refused or stopped before the first batch."""
    with suppress(OSError):  # there may be thumbnails
        if {path.name for path in folder.iterdir()} <= {MARK, THUMBS}:
            (folder / THUMBS).rmdir()
            (folder / MARK).unlink()
            folder.rmdir()


def _info(
    model: SearchModel, collection: VideoCollection, old: IndexInfo | None, settings: Mapping[str, Any]
) -> IndexInfo:
    """Return the info of the new index, of the kind and type of the old one."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    # The index may be searched on another machine than it was made on.
    kept = {name: value for name, value in settings.items() if name not in names_with("machine")}
    if model.config.clip_weights is not None:
        kept["clip_weights"] = str(Path(model.config.clip_weights).absolute())
    if collection.img_tmpl is not None:
        kept["img_tmpl"] = collection.img_tmpl
    return IndexInfo(
        fingerprint=model.fingerprint,
        run=str(model.source.absolute()),
        settings=kept,
        source=str(collection.name),
        root=str(collection.root),
        kind=old.kind if old else "flat",
        dtype=old.dtype if old else "float32",
        made=old.made if old else now,
        changed=now,
    )


def _check_same(folder: Path, old: IndexInfo, new: IndexInfo, dtype: str | None, sync: bool) -> None:
    """Raise UserError if the folder holds the index of something else."""
    other_name = "give another name, or delete the folder"
    if old.fingerprint != new.fingerprint:
        raise UserError(f"-o {folder}: was made with another model ({old.run}); {other_name}")
    if old.source != new.source and Path(old.source).exists() and not sync:
        raise UserError(
            f"-o {folder}: is the index of {old.source}; give another name, or --sync to replace its videos"
        )
    if (old.dtype, dtype) == ("float16", "float32"):
        raise UserError(f"-o {folder}: holds float16 vectors, which cannot become float32 again; {other_name}")
