"""From annotations to what can be trained on or evaluated: their readable videos, and why others are left out.

Training leaves unreadable videos out and names them. An evaluation never becomes smaller unless the user says so
(`skip_missing`). Videos of JSON Lines and tar shards, of which there may be millions, are not tried beforehand: those
that cannot be read are left out of their batches.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from adaclip_finetune.config import Config
from adaclip_finetune.config.parts import DataPart, is_folder_of_videos, is_lazy, parts_of
from adaclip_finetune.data.annotations import VideoAnnotation, load_annotations, parse_video
from adaclip_finetune.data.batches import BatchPlan
from adaclip_finetune.data.class_names import distinct
from adaclip_finetune.data.frame_store import FrameStore
from adaclip_finetune.data.frames import open_store
from adaclip_finetune.data.json_lines import JsonLines
from adaclip_finetune.data.mixture import LazyEntries, MixedEntries, MixedStore, name_in
from adaclip_finetune.data.names import split_extension
from adaclip_finetune.data.queries import (
    Queries,
    TrainEntry,
    digest_of,
    digest_of_entries,
    evaluation_queries,
    train_entries,
)
from adaclip_finetune.data.readable import LISTED, UnreadableVideos, find_unreadable, listing
from adaclip_finetune.data.tar_shards import ShardCaptions, TarShards
from adaclip_finetune.data.video.discovery import describe_unknown_files, find_videos
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.errors import UserError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSplit:
    """A training set. `left_out`: unreadable video → reason. A resumed run recognises its data by `digest`."""

    entries: Sequence[TrainEntry]
    store: FrameStore
    left_out: dict[str, str]
    digest: str
    plan: BatchPlan


@dataclass(frozen=True)
class EvaluationSplit:
    """The texts and the gallery of an evaluation, whose annotation lists `num_listed` videos.

    `left_out`: unreadable video → reason. `classes` are those of all listed videos, if the task is about classes.
    """

    queries: Queries
    store: FrameStore
    left_out: dict[str, str]
    num_listed: int
    classes: list[str] = field(default_factory=list)


def train_split(config: Config, annotation: str | Sequence[DataPart]) -> TrainSplit:
    """Return the training set of an annotation, or of the parts of a mixture.

    Raises UserError if an annotation is wrong, and UnreadableVideos if none of its videos can be read.
    """
    parts = parts_of(annotation)
    listed = [read_listed(part, config.data_subset) for part in parts]
    stores = open_stores(config, parts, listed)
    read = [_read(config, part, videos, stores[part.place]) for part, videos in zip(parts, listed, strict=True)]
    plan = batch_plan(annotation, [len(one.entries) for one in read], config.seed)
    if isinstance(annotation, str):
        (only,) = read
        return TrainSplit(only.entries, stores[parts[0].place], only.left_out, only.digest, plan)
    places, labelled = [part.place for part in parts], [part.labelled for part in parts]
    left_out = {
        name_in(place, video_id): reason
        for place, one in zip(places, read, strict=True)
        for video_id, reason in one.left_out.items()
    }
    digest = digest_of(
        [[one.digest, part.share, part.labelled, part.subset] for one, part in zip(read, parts, strict=True)]
    )
    entries = MixedEntries([one.entries for one in read], places, labelled)
    return TrainSplit(entries, MixedStore(stores), left_out, digest, plan)


def batch_plan(annotation: str | Sequence[DataPart], sizes: Sequence[int], seed: int) -> BatchPlan:
    """Return the batches of a training set whose parts have `sizes` entries."""
    parts = parts_of(annotation)
    shares = () if isinstance(annotation, str) else tuple(part.share for part in parts)
    return BatchPlan(tuple(sizes), seed, tuple(is_lazy(part.annotation) for part in parts), shares)


def read_listed(part: DataPart, data_subset: int = 0) -> list[VideoAnnotation] | JsonLines | ShardCaptions:
    """Return the videos that a part lists; only the first `subset` of the part, or `data_subset`, if above 0.

    Of a folder of videos these are its files, and their names stand for captions. Raises UserError.
    """
    path, data_subset = Path(part.annotation), part.subset or data_subset
    if is_folder_of_videos(part.annotation):
        return _videos_in(path, data_subset)
    if not is_lazy(part.annotation):
        return load_annotations(path, data_subset)
    return ShardCaptions(TarShards(path), data_subset) if path.is_dir() else JsonLines(path, data_subset)


def _videos_in(folder: Path, at_most: int) -> list[VideoAnnotation]:
    try:
        found, _ = find_videos(folder)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from error
    if not found:
        raise UserError(f"{folder}: holds neither videos nor tar shards")
    files = [path.relative_to(folder).as_posix() for path in found]
    stems = [split_extension(file)[0] for file in files]
    several = {stem for stem, count in Counter(stems).items() if count > 1}
    names = [file if stem in several else stem for file, stem in zip(files, stems, strict=True)][: at_most or None]
    return [parse_video(f"{folder}: video {name!a}", name, {"sentences": [name]}) for name in names]


def open_stores(
    config: Config, parts: Sequence[DataPart], listed: Sequence[Sequence[VideoAnnotation]]
) -> dict[str, FrameStore]:
    """Return the stores of the parts by their `place`. Raises UserError."""
    stores: dict[str, FrameStore] = {}
    for part in parts:
        if part.place in stores:
            continue
        if part.place == part.annotation:
            folder = Path(part.annotation)
            stores[part.place] = TarShards(folder) if is_lazy(part.annotation) else VideoFolder(folder)
            continue
        there = [each for one, each in zip(parts, listed, strict=True) if one.place == part.place]
        videos = [video for each in there if isinstance(each, list) for video in each]
        own = {"frames_dir": part.frames_dir, "video_dir": part.video_dir}
        stores[part.place] = open_store(config.model_copy(update=own) if part.place else config, videos)
    return stores


class _Read(NamedTuple):
    entries: Sequence[TrainEntry]
    left_out: dict[str, str]
    digest: str


def _read(
    config: Config, part: DataPart, listed: list[VideoAnnotation] | JsonLines | ShardCaptions, store: FrameStore
) -> _Read:
    if not isinstance(listed, list):
        return _Read(LazyEntries(listed, config.concat_captions), {}, listed.digest)
    videos, left_out = _readable(config, store, listed) if config.trains_on_videos else (listed, dict[str, str]())
    if not videos:
        raise UnreadableVideos(f"{part.annotation}: none of its videos can be read:\n{listing(left_out)}", left_out)
    entries = train_entries(videos, config.concat_captions)
    return _Read(entries, left_out, digest_of_entries(entries))


def evaluation_split(config: Config, annotation: str) -> EvaluationSplit:
    """Return the texts and the gallery of an annotation.

    Raises UserError if the annotation is wrong, and UnreadableVideos if videos cannot be read and `skip_missing` is
    not set.
    """
    listed = load_annotations(annotation)
    store = open_store(config, listed)
    videos, left_out = _readable(config, store, listed)
    if left_out and (not videos or not config.skip_missing):
        raise unreadable_in_evaluation(left_out, len(listed), f"{annotation}: ")
    if not config.task_settings.of_classes:
        queries = evaluation_queries(videos, config.concat_captions)
        return EvaluationSplit(queries, store, left_out, num_listed=len(listed))
    classes = distinct(sentence for video in listed for sentence in video.sentences)
    return EvaluationSplit(evaluation_queries(videos, "indep-all"), store, left_out, len(listed), classes)


def unreadable_in_evaluation(reasons: Mapping[str, str], num_listed: int, where: str = "") -> UnreadableVideos:
    """Return the error that ends an evaluation in which videos cannot be read; `where` begins the message."""
    way_out = (
        "Mend them or take them out of the annotation; --skip_missing evaluates the others and says beside each figure "
        "how many they are"
    )
    if len(reasons) == num_listed:
        way_out = (
            "Is this annotation about your videos? A config file may name that of others; without captions for a test, "
            "give --test_annot none"
        )
    named = listing(reasons, at_most=LISTED if len(reasons) == num_listed else None)
    return UnreadableVideos(
        f"{where}{len(reasons)} of {num_listed} videos to evaluate cannot be read:\n{named}\n{way_out}", reasons
    )


def _readable(
    config: Config, store: FrameStore, listed: list[VideoAnnotation]
) -> tuple[list[VideoAnnotation], dict[str, str]]:
    """Return the videos that can be read, and why others cannot."""
    left_out = find_unreadable(store, [video.video_id for video in listed], config.num_workers)
    videos = [video for video in listed if video.video_id not in left_out]
    if left_out and isinstance(store, VideoFolder) and (line := describe_unknown_files(store.other_files())):
        _log.warning("%s: %s", store.folder, line)
    return videos, left_out
