"""From an annotation file to what can be trained on or evaluated: its readable videos, and an account of the others.

Training leaves unreadable videos out by name. An evaluation does not shrink unless the user says so (`skip_missing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import VideoAnnotation, load_annotations
from adaclip_finetune.data.frame_store import FrameStore
from adaclip_finetune.data.frames import open_store
from adaclip_finetune.data.queries import Queries, TrainEntry, evaluation_queries, train_entries
from adaclip_finetune.data.readable import UnreadableVideos, find_unreadable, listing, short_videos


@dataclass(frozen=True)
class TrainSplit:
    """What is trained on. `left_out`: unreadable video → reason; `short`: videos with fewer than num_frm frames."""

    entries: list[TrainEntry]
    store: FrameStore
    left_out: dict[str, str]
    short: list[str]


@dataclass(frozen=True)
class EvaluationSplit:
    """What is evaluated: texts and the readable gallery, of `num_listed` videos that the annotation lists."""

    queries: Queries
    store: FrameStore
    left_out: dict[str, str]
    short: list[str]
    num_listed: int


def train_split(config: Config, annotation: str) -> TrainSplit:
    """Raises UserError if the annotation is wrong, UnreadableVideos if nothing is left of it."""
    listed = load_annotations(annotation, config.data_subset)
    store, videos, left_out, short = _readable(config, listed)
    if not videos:
        raise UnreadableVideos(f"{annotation}: none of its videos can be read:\n{listing(left_out)}", left_out)
    return TrainSplit(train_entries(videos, config.concat_captions), store, left_out, short)


def evaluation_split(config: Config, annotation: str) -> EvaluationSplit:
    """Raises UserError if the annotation is wrong, UnreadableVideos if videos are unreadable and not to be skipped."""
    listed = load_annotations(annotation)
    store, videos, left_out, short = _readable(config, listed)
    if left_out and (not videos or not config.skip_missing):
        raise unreadable_in_evaluation(left_out, len(listed))
    return EvaluationSplit(
        evaluation_queries(videos, config.concat_captions), store, left_out, short, num_listed=len(listed)
    )


def unreadable_in_evaluation(reasons: Mapping[str, str], num_listed: int) -> UnreadableVideos:
    """The error that an evaluation ends with rather than measure a smaller gallery unasked."""
    return UnreadableVideos(
        f"{len(reasons)} of {num_listed} videos to evaluate cannot be read:\n{listing(reasons, at_most=None)}\n"
        "Mend them or take them out of the annotation; --skip_missing evaluates the others "
        "and says beside each figure how many they are",
        reasons,
    )


def _readable(
    config: Config, listed: list[VideoAnnotation]
) -> tuple[FrameStore, list[VideoAnnotation], dict[str, str], list[str]]:
    store = open_store(config, listed)
    left_out = find_unreadable(store, [video.video_id for video in listed], config.num_workers)
    videos = [video for video in listed if video.video_id not in left_out]
    return store, videos, left_out, short_videos(store, [video.video_id for video in videos], config.num_frm)
