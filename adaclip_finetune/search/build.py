"""Making an index: embed the videos that are new or changed, keep the others, and write all of them."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from adaclip_finetune.config.roles import names_with
from adaclip_finetune.data.dataset import GalleryDataset, VideoBatch, VideoReader
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.loader import FRAMES_A_GALLERY_BATCH, GalleryLoader
from adaclip_finetune.data.readable import find_unreadable, listing
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.data.video.remote import is_url
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.parts import ABOUT, PartFolder
from adaclip_finetune.hub import on_hub
from adaclip_finetune.lock import FolderLock
from adaclip_finetune.search.collection import CollectionVideo, VideoCollection, copies_among
from adaclip_finetune.search.index import THUMBS
from adaclip_finetune.search.moments import Moment, MomentSettings, embed_moments
from adaclip_finetune.search.pictures import thumbnail
from adaclip_finetune.search.search_model import SearchModel, WeightedFrames
from adaclip_finetune.search.shards import Shard
from adaclip_finetune.search.stored import (
    FILE,
    PARTS,
    EmbeddedMoments,
    EmbeddedVideo,
    IndexInfo,
    StoredIndex,
    read_index,
    write_index,
)

Embedded = tuple[list[EmbeddedVideo], dict[str, str]]
"""A batch of videos, and those that failed: id → reason."""


class Work(NamedTuple):
    """What is to be embedded of a collection: `new` videos and, with `moments`, then the parts of these and of the
    `undivided` ones, by id, which are embedded already."""

    collection: VideoCollection
    new: Sequence[CollectionVideo]
    undivided: Mapping[str, EmbeddedVideo]
    moments: MomentSettings | None


Runner = Callable[[SearchModel, Work, Path], Iterator[Embedded]]
"""What embeds videos as `embed_videos` does, perhaps in other processes."""


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
    shard: Shard | None = None,
    runner: Runner | None = None,
) -> IndexingReport:
    """Write the index of a collection into `folder`, or update the one that is there.

    `dtype` defaults to that of the index that is there, else float32. With `sync`, videos that the collection lacks are
    dropped. `settings` are those with which the model was loaded. With `moments`, parts of the videos are embedded too.
    With `shard`, only its videos are embedded, and what is written is a part (`merge.py`). `runner` embeds the videos
    somewhere else than in this process.
    Raise UserError; batches that were finished until then are kept, and the same call continues from there.
    """
    model.refuse_query_dependent()
    info = _info(model, collection, settings or {}, moments, shard)
    about: dict[str, Any] = {"fingerprint": model.fingerprint, "source": info.source, "root": str(collection.root)}
    about |= {"img_tmpl": collection.img_tmpl} | ({"moments": info.moments} if info.moments else {})
    with writing(folder, about) as parts:
        old = read_index(folder) if (folder / FILE).exists() else None
        if old is not None:
            check_same(folder, old.info, info, sync)
        parts.open()
        (folder / THUMBS).mkdir(exist_ok=True)
        report, videos = _update(model, collection, folder, old, parts, sync, moments, shard, runner)
        positions = {video.id: place for place, video in enumerate(collection.videos)} if shard else {}
        kept_dtype = old.vectors.dtype if old else np.dtype("float32")
        replace_index(folder, info, videos, model.width, np.dtype(dtype or kept_dtype), positions)
        return report


@contextmanager
def writing(folder: Path, about: Mapping[str, Any]) -> Iterator[PartFolder]:
    """Make the folder of an index, lock it, and give the place of finished batches in it, which the body opens.

    Raise UserError for a folder of something else, and for errors of the disk in the body.
    """
    parts = PartFolder(folder / PARTS, about)
    lock = FolderLock(folder)
    try:
        _claim(folder)
        lock.take()
        try:
            yield parts
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


def replace_index(
    folder: Path,
    info: IndexInfo,
    videos: Sequence[EmbeddedVideo],
    width: int,
    dtype: np.dtype[Any],
    positions: Mapping[str, int] | None = None,
) -> None:
    """Write the index of these videos, whose pictures are there, and delete what it does not need.

    `positions` are those of the videos of a part, by id. Raise OSError.
    """
    vectors = np.array([video.vector for video in videos]).reshape(len(videos), width).astype(dtype)
    of_videos = [video.moments for video in videos if video.moments is not None]
    rows = [video.row for video in videos]
    write_index(folder, info, vectors, rows, of_videos, [positions[row["id"]] for row in rows] if positions else ())
    shutil.rmtree(folder / PARTS)
    for name in _thumbs_in(folder).difference(*(video.thumbs() for video in videos)):
        (folder / THUMBS / name).unlink()


def _update(
    model: SearchModel,
    collection: VideoCollection,
    folder: Path,
    old: StoredIndex | None,
    parts: PartFolder,
    sync: bool,
    moments: MomentSettings | None,
    shard: Shard | None,
    runner: Runner | None,
) -> tuple[IndexingReport, list[EmbeddedVideo]]:
    """Embed what is new or changed, keeping finished batches in `parts`. Return all videos of the new index."""
    listed, collection = collection, collection if shard is None else shard.share(collection)
    finished = {video.row["id"]: video for video in _read_parts(parts)}
    known = {video.row["id"]: video for video in (old.videos() if old else ())} | finished
    if shard is not None:
        _refuse_vanished(folder, known.keys() - {video.id for video in listed.videos}, sync)
        mine = {video.id for video in collection.videos}  # a file that changes may move to another shard
        known = {name: video for name, video in known.items() if name in mine}
    thumbs = _thumbs_in(folder)
    same_frames = old is None or collection.img_tmpl in (None, old.info.settings.get("img_tmpl"))
    unchanged = {
        video.id
        for video in collection.videos
        if (one := (known if same_frames else finished).get(video.id))
        and (one.row["size"], one.row["mtime_ns"]) == video.stamp
        and one.thumbs() <= thumbs
    }
    nothing_dropped = "; nothing is dropped" if known else ""
    if not (listed.videos or listed.broken):
        raise UserError(f"{collection.name}: holds no video{nothing_dropped}")
    started = time.monotonic()
    new = [video for video in collection.videos if video.id not in unchanged]
    kept = [video for video in collection.videos if video.id in unchanged]
    copies = copies_among(new, kept) if isinstance(collection.store, VideoFolder) else {}
    originals = [video for video in new if video.id not in copies]
    broken = dict(collection.broken)
    if runner is None:  # another one finds them where it reads them
        broken |= find_unreadable(collection.store, [video.id for video in originals], model.config.num_workers)
    readable = [video for video in originals if video.id not in broken]
    undivided = {name: known[name] for name in unchanged if moments and known[name].moments is None}
    found: dict[str, EmbeddedVideo] = {}
    work = Work(collection, readable, undivided, moments)
    for batch, failed in (runner or embed_videos)(model, work, folder / THUMBS):
        broken |= failed
        if batch:
            _write_part(parts, batch)
        found |= {video.row["id"]: video for video in batch}
    known |= found
    fresh = found.keys() - unchanged - broken.keys()
    unchanged -= broken.keys()
    if shard is None and not unchanged and not fresh:
        raise UserError(f"{collection.name}: none of its videos can be read{nothing_dropped}:\n{listing(broken)}")
    broken |= {one: broken[first] for one, first in copies.items() if first in broken}
    seconds = time.monotonic() - started

    result = {}
    for video in collection.videos:
        source = copies.get(video.id, video.id)
        if source in fresh or source in unchanged:
            row, vector, of_video = known[source]
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


def embed_videos(model: SearchModel, work: Work, thumbs: Path) -> Iterator[Embedded]:
    """Yield batches of embedded videos, whose pictures are written into the folder `thumbs`, with the videos that
    failed. A video comes again when it has moments."""
    whole = dict(work.undivided)
    for batch, failed in _embed(model, work.collection, work.new, thumbs):
        whole |= {video.row["id"]: video for video in batch}
        yield batch, failed
    if work.moments is not None:
        yield from _divide(model, work.collection, whole, work.moments, thumbs)


def _divide(
    model: SearchModel,
    collection: VideoCollection,
    whole: Mapping[str, EmbeddedVideo],
    settings: MomentSettings,
    thumbs: Path,
) -> Iterator[Embedded]:
    """Embed the parts of videos, and yield each video with its moments, or that it failed."""
    videos = [video for video in collection.videos if video.id in whole]
    bar = tqdm(total=len(videos), desc="embedding moments", unit="video", leave=False, disable=None)
    with closing(embed_moments(model, collection, videos, settings)) as embedded, ThreadPoolExecutor(2) as pool, bar:
        for video, moments in embedded:
            bar.update()
            if isinstance(moments, FrameError):
                yield [], {video.id: f"{moments.path}: {moments.reason}"}
                continue
            rows = list(pool.map(lambda moment, of=video: _moment_row(of, moment, thumbs), moments))
            of_video = EmbeddedMoments(rows, np.stack([moment.vector for moment in moments]))
            yield [whole[video.id]._replace(moments=of_video)], {}


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
) -> Iterator[Embedded]:
    by_id = {video.id: video for video in videos}
    dataset = GalleryDataset(list(by_id), VideoReader(collection.store, model.config, model.model.views()))
    bar = tqdm(total=len(by_id), desc="embedding", unit="video", leave=False, disable=None)
    with closing(GalleryLoader(dataset, model.config)) as loader, ThreadPoolExecutor(2) as pool, bar:
        for collated in loader.read(range(len(loader))):
            failed = {error.video_id: f"{error.path}: {error.reason}" for error in collated.failures}
            embedded = []
            if collated.videos is not None:
                batch = [by_id[name] for name in collated.videos.video_ids]
                vectors, weighted = _embed_alike(model, collated.videos)
                rows = pool.map(lambda given: _row(collection, thumbs, *given), zip(batch, weighted, strict=True))
                for row, vector in zip(rows, vectors.numpy(), strict=True):
                    if isinstance(row, FrameError):
                        failed[row.video_id] = row.reason
                    else:
                        embedded.append(EmbeddedVideo(row, vector))
            yield embedded, failed
            bar.update(len(embedded) + len(failed))


def _embed_alike(model: SearchModel, videos: VideoBatch) -> tuple[Tensor, list[WeightedFrames]]:
    """Return the vectors (B, D) of videos, and the frames that they were made of, computed in groups of one size.

    The last bits of a vector depend on how many videos are computed together, but not on which. Groups that are not
    full are filled up.
    """
    size = _together(model)
    vectors, frames = list[Tensor](), list[WeightedFrames]()
    for start in range(0, len(videos), size):
        group = range(start, min(start + size, len(videos)))
        found, weighted = model.embed(videos.at([*group, *[group[-1]] * (size - len(group))]))
        vectors.append(found[: len(group)])
        frames += weighted[: len(group)]
    return torch.cat(vectors), frames


def _together(model: SearchModel) -> int:
    """Return how many videos are computed together: one on a CPU, where more are no faster."""
    return 1 if model.model.device.type == "cpu" else min(16, max(1, FRAMES_A_GALLERY_BATCH // model.config.num_frm))


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
    model: SearchModel,
    collection: VideoCollection,
    settings: Mapping[str, Any],
    moments: MomentSettings | None,
    shard: Shard | None,
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
    part = None if shard is None else shard.facts(collection)
    return IndexInfo(model.fingerprint, str(run), kept, str(collection.name), model.untrained, divided, part)


def _refuse_vanished(folder: Path, vanished: Collection[str], sync: bool) -> None:
    """Raise UserError if a part would keep videos that are no longer there, which have no place in the whole."""
    if vanished and not sync:
        names = ", ".join(sorted(vanished)[:5]) + (" …" if len(vanished) > 5 else "")
        raise UserError(f"{folder}: {len(vanished)} of its videos are no longer there ({names}): --sync drops them")


def check_same(folder: Path, old: IndexInfo, new: IndexInfo, sync: bool) -> None:
    """Raise UserError if the folder holds the index of something else."""
    if old.fingerprint != new.fingerprint:
        raise UserError(
            f"-o {folder}: was made with another model ({old.run}); give another name, or delete the folder"
        )
    there = is_url(old.source) or Path(old.source).exists()
    if old.source != new.source and there and not sync:
        raise UserError(
            f"-o {folder}: is the index of {old.source}; give another name, or --sync to replace its videos"
        )
    if old.moments not in (None, new.moments):
        given = MomentSettings(**old.moments).flags()
        raise UserError(f"-o {folder}: was made with {given}; give the same flags, or another name")
    is_part, becomes_part = _part_name(old), _part_name(new)
    if is_part != becomes_part:
        raise UserError(f"-o {folder}: is {is_part}, not {becomes_part}; give another name, or delete the folder")


def _part_name(info: IndexInfo) -> str:
    return "a whole index" if info.shard is None else f"shard {info.shard['number']}/{info.shard['of']} of an index"
