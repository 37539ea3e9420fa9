"""How much of a data set took part in training or choosing a model before it is evaluated on it."""

from __future__ import annotations

from collections.abc import Sequence

from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import VideoAnnotation, folded, load_annotations
from adaclip_finetune.data.queries import Queries
from adaclip_finetune.errors import UserError


def seen_by(config: Config, annotation: str) -> str:
    """Return what a run with these settings learned from, or was chosen on, of the videos and captions in `annotation`.

    Returns "" if nothing is known to overlap.
    """
    uses = {"it learned from": config.train_annot, "its epoch was chosen on": config.val_annot}
    told = []
    for use, path in uses.items():
        overlap = overlap_of_files(path, annotation) if path else ""
        if overlap is None:
            told.append(f"{use} {path}, which cannot be read here, so it is unknown whether that holds these captions")
        elif overlap:
            told.append(f"{use} {overlap}")
    return "; ".join(told)


def overlap_of_files(used: str, annotation: str) -> str | None:
    """Return what of `annotation` the annotation file `used` also holds, "" if nothing; None if it cannot be read."""
    evaluated = load_annotations(annotation)
    try:
        return _overlap(load_annotations(used), evaluated)
    except (UserError, OSError):
        return None


def overlap_of_queries(used: Queries, evaluated: Queries) -> str:
    """Return what of the gallery and queries `evaluated` is also in `used`, "" if nothing."""
    return _overlap(_videos(used), _videos(evaluated))


def _overlap(used: Sequence[VideoAnnotation], evaluated: Sequence[VideoAnnotation]) -> str:
    """Clips of the same source video (`group`) count as the same video."""
    ids, groups = {video.video_id for video in used}, {video.group for video in used} - {None}
    texts = {folded(text) for video in used for text in video.sentences}
    videos = [video.video_id in ids or video.group in groups for video in evaluated]
    captions = [folded(text) in texts for video in evaluated for text in video.sentences]
    if all(videos) and all(captions):
        return "these very captions"
    parts = {"videos": videos, "captions": captions}
    return " and ".join(f"{sum(part):,} of these {len(part):,} {name}" for name, part in parts.items() if any(part))


def _videos(queries: Queries) -> list[VideoAnnotation]:
    texts: list[list[str]] = [[] for _ in queries.video_ids]
    for text, video in zip(queries.texts, queries.video_of_text.tolist(), strict=True):
        texts[video].append(text)
    return [VideoAnnotation(name, tuple(of_video)) for name, of_video in zip(queries.video_ids, texts, strict=True)]
