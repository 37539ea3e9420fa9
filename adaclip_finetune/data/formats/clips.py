"""Clips with their captions, as they are read from the files of a data set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from adaclip_finetune.data.names import canonical
from adaclip_finetune.errors import UserError

SPLITS = ("train", "val", "test")


@dataclass
class SourceClip:
    """A clip with its captions as the source has them. All times are in seconds.

    `start` and `end` cut the clip out of the file that `group` names. Where published files are clips already, their
    times in the source video become `duration`. `timestamps` are times within the clip, one for each sentence. The
    sentences of a `paragraph` tell one thing after another, so the same words may occur twice. `split` is the split
    that the source names, `key` identifies an entry that it may repeat, and `where` is its place, for messages.
    """

    where: str
    video: str
    sentences: list[str]
    timestamps: list[tuple[float, float]] | None = None
    start: float | None = None
    end: float | None = None
    duration: float | None = None
    extension: str | None = None
    group: str | None = None
    paragraph: bool = False
    split: str | None = None
    key: object = None


@dataclass
class SourceSplit:
    """The clips of a split, each video once, and what only the reader can count."""

    clips: Iterable[SourceClip]
    absent: list[str] = field(default_factory=list)  # videos that a list names, and that have no captions
    duplicates: int = 0  # entries that were repeated and left out


def merged(rows: Iterable[SourceClip]) -> SourceSplit:
    """Return the rows of each video as one clip, in the order of first appearance. Raises UserError."""
    clips: dict[str, SourceClip] = {}
    keys: set[object] = set()
    duplicates = 0
    for row in rows:
        if row.key is not None and row.key in keys:
            duplicates += 1
            continue
        keys.add(row.key)
        clip = clips.setdefault(canonical(row.video), row)
        if clip is row:
            continue
        if (clip.start, clip.end) != (row.start, row.end):
            raise UserError(f"{row.where}: the video {row.video!r} was named before, with other times")
        if None not in (clip.extension, row.extension) and clip.extension != row.extension:
            files = f"{row.video}.{clip.extension} and {row.video}.{row.extension}"
            raise UserError(f"{row.where}: {files} would be one video; give the two files different names")
        clip.sentences += row.sentences
        both = clip.timestamps is not None and row.timestamps is not None
        clip.timestamps = [*(clip.timestamps or ()), *(row.timestamps or ())] if both else None
    return SourceSplit(list(clips.values()), duplicates=duplicates)
