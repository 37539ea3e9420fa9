"""How much of a data set took part in training or choosing a model before it is evaluated on it."""

from __future__ import annotations

from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import folded, load_annotations
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
    """Return what of `annotation` the annotation file `used` also holds, "" if nothing; None if it cannot be read.

    Clips of the same source video (`group`) count as the same video.
    """
    evaluated = load_annotations(annotation)
    try:
        learned = load_annotations(used)
    except (UserError, OSError):
        return None
    ids, groups = {video.video_id for video in learned}, {video.group for video in learned} - {None}
    texts = {folded(text) for video in learned for text in video.sentences}
    videos = [video.video_id in ids or video.group in groups for video in evaluated]
    captions = [folded(text) in texts for video in evaluated for text in video.sentences]
    if all(videos) and all(captions):
        return "these very captions"
    parts = {"videos": videos, "captions": captions}
    return " and ".join(f"{sum(part):,} of these {len(part):,} {name}" for name, part in parts.items() if any(part))
