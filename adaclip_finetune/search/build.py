"""Making an index: embed the videos that are new or changed, keep the others, and write all of them."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from adaclip_finetune.config.roles import names_with
from adaclip_finetune.data.dataset import GalleryDataset, VideoReader
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.loader import GalleryLoader
from adaclip_finetune.data.readable import find_unreadable, listing
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.parts import ABOUT, PartFolder
from adaclip_finetune.hub import on_hub
from adaclip_finetune.lock import FolderLock
from adaclip_finetune.search.collection import CollectionVideo, VideoCollection, copies_among
from adaclip_finetune.search.index import (
    FILE,
    PARTS,
    THUMBS,
    EmbeddedMoments,
    EmbeddedVideo,
    IndexInfo,
    StoredIndex,
    read_index,
    write_index,
)
from adaclip_finetune.search.moments import Moment, MomentSettings, embed_moments
from adaclip_finetune.search.pictures import thumbnail
from adaclip_finetune.search.search_model import SearchModel, WeightedFrames
from adaclip_finetune.training.memory import memory_explained


@dataclass(frozen=True)
class IndexingReport:
    """What `index_videos` did."""

    embedded: int  # videos
    copies: int  # videos that got the vector of another file with the same bytes
    seconds: float  # that checking and embedding them took
    kept: int  # videos that were in the index and have not changed
    broken: dict[str, str]  # id → why the video cannot be read
    vanished: list[str]  # ids of indexed videos that the collection lacks; dropped if `sync`
    count: int  # videos that are in the index now
    moments: int  # moments that are in the index now


def index_videos(
    model: SearchModel,
    collection: VideoCollection,
    folder: Path,
    *,
    dtype: Literal["float32", "float16"] | None = None,
    sync: bool = False,
    settings: Mapping[str, Any] | None = None,
    moments: MomentSettings | None = None,
) -> IndexingReport:
    """Write the index of a collection into `folder`, or update the one that is there.

    `dtype` defaults to that of the index that is there, else float32. With `sync`, videos that the collection lacks are
    dropped. `settings` are those with which the model was loaded. With `moments`, parts of the videos are embedded too.
    Raise UserError; batches that were finished until then are kept, and the same call continues from there.
    """
    model.refuse_query_dependent()
    info = _info(model, collection, settings or {}, moments)
    about: dict[str, Any] = {"fingerprint": model.fingerprint, "source": info.source, "root": str(collection.root)}
    about |= {"img_tmpl": collection.img_tmpl} | ({"moments": info.moments} if info.moments else {})
    parts = PartFolder(folder / PARTS, about)
    lock = FolderLock(folder)
    try:
        _claim(folder)
        lock.take()
        try:
            old = read_index(folder) if (folder / FILE).exists() else None
            if old is not None:
                _check_same(folder, old.info, info, sync)
            parts.open()
            (folder / THUMBS).mkdir(exist_ok=True)
            report, videos = _update(model, collection, folder, old, parts, sync, moments)
            vectors = np.array([video.vector for video in videos]).reshape(len(videos), model.width)
            kept_dtype = old.vectors.dtype if old else np.dtype("float32")
            of_videos = [video.moments for video in videos if video.moments is not None]
            rows = [video.row for video in videos]
            write_index(folder, info, vectors.astype(dtype or kept_dtype), rows, of_videos)
            shutil.rmtree(parts.path)
            for name in _thumbs_in(folder).difference(*(video.thumbs() for video in videos)):
                (folder / THUMBS / name).unlink()
            return report
        finally:
            if not parts.names():
                shutil.rmtree(parts.path, ignore_errors=True)
                if not (folder / FILE).exists():
                    shutil.rmtree(folder / THUMBS, ignore_errors=True)
            lock.release()
            with suppress(OSError):  # it is not empty
                folder.rmdir()
    except OSError as error:
        raise UserError(f"{folder}: {error}. Finished batches are kept; the same command continues") from error


def _update(
    model: SearchModel,
    collection: VideoCollection,
    folder: Path,
    old: StoredIndex | None,
    parts: PartFolder,
    sync: bool,
    moments: MomentSettings | None,
) -> tuple[IndexingReport, list[EmbeddedVideo]]:
    """Embed what is new or changed, keeping finished batches in `parts`. Return all videos of the new index."""
    finished = {video.row["id"]: video for video in _read_parts(parts)}
    known = {video.row["id"]: video for video in (old.videos() if old else ())} | finished
    thumbs = _thumbs_in(folder)
    same_frames = old is None or collection.img_tmpl in (None, old.info.settings.get("img_tmpl"))
    unchanged = {
        video.id
        for video in collection.videos
        if (found := (known if same_frames else finished).get(video.id))
        and (found.row["size"], found.row["mtime_ns"]) == video.stamp
        and found.thumbs() <= thumbs
    }
    nothing_dropped = "; nothing is dropped" if known else ""
    if not (collection.videos or collection.broken):
        raise UserError(f"{collection.name}: holds no video{nothing_dropped}")
    started = time.monotonic()
    new = [video for video in collection.videos if video.id not in unchanged]
    kept = [video for video in collection.videos if video.id in unchanged]
    copies = copies_among(new, kept) if isinstance(collection.store, VideoFolder) else {}
    originals = [video for video in new if video.id not in copies]
    broken = find_unreadable(collection.store, [video.id for video in originals], model.config.num_workers)
    broken |= collection.broken
    readable = [video for video in originals if video.id not in broken]
    if not unchanged and not readable:
        raise UserError(f"{collection.name}: none of its videos can be read{nothing_dropped}:\n{listing(broken)}")
    fresh: dict[str, EmbeddedVideo] = {}
    for batch, failed in _embed(model, collection, readable, folder / THUMBS):
        broken |= failed
        if batch:
            _write_part(parts, batch)
        fresh |= {video.row["id"]: video for video in batch}
    if moments is not None:
        whole = {name: known[name] for name in unchanged if known[name].moments is None} | fresh
        divided, failed = _divide(model, collection, whole, moments, folder / THUMBS, parts)
        broken |= failed
        known |= divided
        fresh = {name: known[name] for name in fresh if name not in failed}
        unchanged -= failed.keys()
    broken |= {one: broken[first] for one, first in copies.items() if first in broken}
    seconds = time.monotonic() - started

    result = {}
    for video in collection.videos:
        source = copies.get(video.id, video.id)
        if source in fresh or source in unchanged:
            row, vector, of_video = fresh.get(source) or known[source]
            # The folder may have moved, and captions and metadata may have changed, since the video was embedded.
            own: dict[str, Any] = {"id": video.id, "path": str(video.path), "mtime_ns": video.stamp.mtime_ns}
            row = {name: value for name, value in row.items() if name != "metadata"}
            own |= {"captions": list(video.captions)} | ({"metadata": video.metadata} if video.metadata else {})
            result[video.id] = EmbeddedVideo(row | own, vector, of_video)
    ids = {video.id for video in collection.videos}
    vanished = [name for name in known if name not in ids]
    if not sync:
        nothing = None if moments is None else EmbeddedMoments([], np.empty((0, model.width), np.float32))
        result |= {name: known[name]._replace(moments=known[name].moments or nothing) for name in vanished}
    copied = len(copies.keys() & result.keys())
    count = sum(len(video.moments.rows) for video in result.values() if video.moments)
    report = IndexingReport(len(fresh), copied, seconds, len(unchanged), broken, vanished, len(result), count)
    return report, list(result.values())


def _write_part(parts: PartFolder, videos: Sequence[EmbeddedVideo]) -> None:
    """Keep embedded videos, of which all have moments or none."""
    tensors = {"vectors": torch.from_numpy(np.stack([video.vector for video in videos]))}
    values: dict[str, Any] = {"rows": [video.row for video in videos]}
    if moments := [video.moments for video in videos if video.moments]:
        tensors["moments"] = torch.from_numpy(np.concatenate([one.vectors for one in moments]))
        values["moments"] = [one.rows for one in moments]
    parts.write(f"{len(parts.names()):06d}", tensors, values)


def _read_parts(parts: PartFolder) -> Iterator[EmbeddedVideo]:
    """Yield what was kept. A video whose moments were embedded later comes again, with them."""
    for name in parts.names():
        if found := parts.read(name):
            tensors, values = found
            moments: Iterable[EmbeddedMoments | None] = repeat(None)
            if rows := values.get("moments"):
                ends = np.cumsum([len(of_one) for of_one in rows])
                moments = map(EmbeddedMoments, rows, np.split(tensors["moments"].numpy(), ends))
            yield from map(EmbeddedVideo, values["rows"], tensors["vectors"].numpy(), moments)


def _divide(
    model: SearchModel,
    collection: VideoCollection,
    whole: Mapping[str, EmbeddedVideo],
    settings: MomentSettings,
    thumbs: Path,
    parts: PartFolder,
) -> tuple[dict[str, EmbeddedVideo], dict[str, str]]:
    """Embed the parts of videos, keeping them in `parts`. Return the videos with their moments, and those that failed:
    id → reason."""
    videos = [video for video in collection.videos if video.id in whole]
    divided: dict[str, EmbeddedVideo] = {}
    failed: dict[str, str] = {}
    bar = tqdm(total=len(videos), desc="embedding moments", unit="video", leave=False, disable=None)
    with closing(embed_moments(model, collection, videos, settings)) as embedded, ThreadPoolExecutor(2) as pool, bar:
        for video, moments in embedded:
            bar.update()
            if isinstance(moments, FrameError):
                failed[video.id] = f"{moments.path}: {moments.reason}"
                continue
            rows = list(pool.map(lambda moment, of=video: _moment_row(of, moment, thumbs), moments))
            of_video = EmbeddedMoments(rows, np.stack([moment.vector for moment in moments]))
            divided[video.id] = whole[video.id]._replace(moments=of_video)
            _write_part(parts, [divided[video.id]])
    return divided, failed


def _moment_row(video: CollectionVideo, moment: Moment, thumbs: Path) -> dict[str, Any]:
    name = _thumb_name(video, moment.frame)
    if not (thumbs / name).exists():
        write_durably(thumbs / name, moment.picture, shared=True)
    start, end = moment.span
    return {"start": start, "end": end, "time": moment.time, "thumb": name}


def _thumbs_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / THUMBS).iterdir()}


def _thumb_name(video: CollectionVideo, frame: int) -> str:
    return f"{hashlib.sha256(repr((video.id, video.stamp, frame)).encode()).hexdigest()[:20]}.jpg"


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
    """The row of the index; the thumbnail comes from the store that the model's frames come from."""
    try:
        duration, times = collection.times(video, weighted.frames)
        best = weighted.frames[weighted.best] if weighted.frames else 0
        picture = thumbnail(collection.store.read(video.id, [best])[0])
    except FrameError as error:
        return error
    name = _thumb_name(video, best)
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


def _claim(folder: Path) -> None:
    """Make the folder of the index. Files in it may later be replaced or deleted, so it must be an index already, or
    empty. Raise UserError."""
    folder.mkdir(exist_ok=True)
    is_index = (folder / FILE).exists() or (folder / PARTS / ABOUT).exists()
    if not is_index and any(path.name != "lock.json" for path in folder.iterdir()):
        raise UserError(f"-o {folder}: is not an index and not empty; give the name of a new folder")


def _info(
    model: SearchModel, collection: VideoCollection, settings: Mapping[str, Any], moments: MomentSettings | None
) -> IndexInfo:
    # The index may be searched on another machine than it was made on.
    kept = {name: value for name, value in settings.items() if name not in names_with("machine")}
    if model.config.clip_weights is not None:
        kept["clip_weights"] = str(Path(model.config.clip_weights).absolute())
    if collection.img_tmpl is not None:
        kept["img_tmpl"] = collection.img_tmpl
    is_name = on_hub(model.source) or (model.untrained and not model.source.exists())
    run = model.source if is_name else model.source.absolute()
    divided = None if moments is None else asdict(moments)
    return IndexInfo(model.fingerprint, str(run), kept, str(collection.name), model.untrained, divided)


def _check_same(folder: Path, old: IndexInfo, new: IndexInfo, sync: bool) -> None:
    """Raise UserError if the folder holds the index of something else."""
    if old.fingerprint != new.fingerprint:
        raise UserError(
            f"-o {folder}: was made with another model ({old.run}); give another name, or delete the folder"
        )
    if old.source != new.source and Path(old.source).exists() and not sync:
        raise UserError(
            f"-o {folder}: is the index of {old.source}; give another name, or --sync to replace its videos"
        )
    if old.moments not in (None, new.moments):
        given = MomentSettings(**old.moments).flags()
        raise UserError(f"-o {folder}: was made with {given}; give the same flags, or another name")
