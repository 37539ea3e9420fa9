"""What of a data set took part in training or choosing before it was evaluated, in words that stand beside a figure."""

from __future__ import annotations

from collections.abc import Sequence

from adaclip_finetune.data.annotations import VideoAnnotation, folded, load_annotations
from adaclip_finetune.data.queries import Queries
from adaclip_finetune.errors import UserError


def known_of_file(known: str | None, annotation: str) -> str | None:
    """What the annotation `known` holds of another one; empty if that is nothing; None if `known` is not here, or
    cannot be read."""
    if known is None:
        return ""
    asked = load_annotations(annotation)
    try:
        return _known(load_annotations(known), asked)
    except (UserError, OSError):
        return None


def known_of_queries(known: Queries, asked: Queries) -> str:
    """What one gallery with its queries holds of another one; empty if that is nothing."""
    return _known(_videos(known), _videos(asked))


def _known(known: Sequence[VideoAnnotation], asked: Sequence[VideoAnnotation]) -> str:
    """Clips of the same source video (`group`) are the same video here."""
    ids, groups = {video.video_id for video in known}, {video.group for video in known} - {None}
    texts = {folded(text) for video in known for text in video.sentences}
    videos = [video.video_id in ids or video.group in groups for video in asked]
    captions = [folded(text) in texts for video in asked for text in video.sentences]
    if all(videos) and all(captions):
        return "these very captions"
    parts = {"videos": videos, "captions": captions}
    return " and ".join(f"{sum(part):,} of these {len(part):,} {name}" for name, part in parts.items() if any(part))


def _videos(queries: Queries) -> list[VideoAnnotation]:
    texts: list[list[str]] = [[] for _ in queries.video_ids]
    for text, video in zip(queries.texts, queries.video_of_text.tolist(), strict=True):
        texts[video].append(text)
    return [VideoAnnotation(name, tuple(of_it)) for name, of_it in zip(queries.video_ids, texts, strict=True)]
