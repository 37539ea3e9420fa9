"""From an annotation file to what can be trained on or evaluated: its readable videos, and why others are left out.

Training leaves unreadable videos out and names them. An evaluation never becomes smaller unless the user says so
(`skip_missing`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import VideoAnnotation, load_annotations
from adaclip_finetune.data.frame_store import FrameStore
from adaclip_finetune.data.frames import open_store
from adaclip_finetune.data.queries import Queries, TrainEntry, evaluation_queries, train_entries
from adaclip_finetune.data.readable import UnreadableVideos, find_unreadable, listing
from adaclip_finetune.data.video.discovery import describe_unknown_files
from adaclip_finetune.data.video.folder import VideoFolder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSplit:
    """A training set. `left_out`: unreadable video → reason."""

    entries: list[TrainEntry]
    store: FrameStore
    left_out: dict[str, str]


@dataclass(frozen=True)
class EvaluationSplit:
    """The texts and the gallery of an evaluation, whose annotation lists `num_listed` videos.

    `left_out`: unreadable video → reason.
    """

    queries: Queries
    store: FrameStore
    left_out: dict[str, str]
    num_listed: int


def train_split(config: Config, annotation: str) -> TrainSplit:
    """Return the training set of an annotation.

    Raises UserError if the annotation is wrong, and UnreadableVideos if none of its videos can be read.
    """
    listed = load_annotations(annotation, config.data_subset)
    store, videos, left_out = _readable(config, listed)
    if not videos:
        raise UnreadableVideos(f"{annotation}: none of its videos can be read:\n{listing(left_out)}", left_out)
    return TrainSplit(train_entries(videos, config.concat_captions), store, left_out)


def evaluation_split(config: Config, annotation: str) -> EvaluationSplit:
    """Return the texts and the gallery of an annotation.

    Raises UserError if the annotation is wrong, and UnreadableVideos if videos cannot be read and `skip_missing` is
    not set.
    """
    listed = load_annotations(annotation)
    store, videos, left_out = _readable(config, listed)
    if left_out and (not videos or not config.skip_missing):
        raise unreadable_in_evaluation(left_out, len(listed))
    return EvaluationSplit(evaluation_queries(videos, config.concat_captions), store, left_out, num_listed=len(listed))


def unreadable_in_evaluation(reasons: Mapping[str, str], num_listed: int) -> UnreadableVideos:
    """Return the error that ends an evaluation in which videos cannot be read."""
    return UnreadableVideos(
        f"{len(reasons)} of {num_listed} videos to evaluate cannot be read:\n{listing(reasons, at_most=None)}\n"
        "Mend them or take them out of the annotation; --skip_missing evaluates the others and says beside each figure "
        "how many they are",
        reasons,
    )


def _readable(
    config: Config, listed: list[VideoAnnotation]
) -> tuple[FrameStore, list[VideoAnnotation], dict[str, str]]:
    """Return the store, the videos that can be read, and why others cannot."""
    store = open_store(config, listed)
    left_out = find_unreadable(store, [video.video_id for video in listed], config.num_workers)
    videos = [video for video in listed if video.video_id not in left_out]
    if left_out and isinstance(store, VideoFolder) and (line := describe_unknown_files(store.other_files())):
        _log.warning("%s: %s", store.folder, line)
    return store, videos, left_out
