"""What every reader gives and the writer takes: clips with their captions, and splits of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

SPLITS = ("train", "val", "test")


@dataclass
class Clip:
    """One entry of the output, its captions as the source has them. Times are in seconds.

    `start` and `end` cut it out of the file that `group` names; times in a source video whose clips are files of their
    own become `duration`. `timestamps` are within the clip, one a sentence. The sentences of a `paragraph` tell of one
    thing after another: the same words twice are no duplicate there. `where` is the place in the source, for messages.
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


@dataclass
class Source:
    """One split: its clips (each video once), and what a reader alone can count."""

    clips: Iterable[Clip]
    absent: list[str] = field(default_factory=list)  # ids that a list names and no captions are there for
    duplicates: int = 0  # entries that stand twice


def merged(rows: Iterable[Clip]) -> list[Clip]:
    """Rows of the same video as one clip, in the order of first appearance."""
    clips: dict[str, Clip] = {}
    for row in rows:
        clip = clips.setdefault(row.video, row)
        if clip is not row:
            clip.sentences.extend(row.sentences)
            if clip.timestamps is not None and row.timestamps is not None:
                clip.timestamps.extend(row.timestamps)
    return list(clips.values())
