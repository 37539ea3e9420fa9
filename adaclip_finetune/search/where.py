"""Conditions on the videos that a search may find: `duration > 60`, `folder = holidays`, `date >= 2026-05`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, TypeAlias

from adaclip_finetune.errors import UserError

if TYPE_CHECKING:
    from adaclip_finetune.search.index import Hit, IndexedVideo

Condition: TypeAlias = "Callable[[IndexedVideo], bool]"

_FORM = re.compile(r"\s*(?P<field>\w+)\s*(?P<sign>!=|<=|>=|=|<|>)\s*(?P<value>.*\S)\s*")
_DATE = re.compile(r"\d{4}(-\d\d(-\d\d(T\d\d(:\d\d)?)?)?)?")
_SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    **{"=": operator.eq, "!=": operator.ne, "<": operator.lt},
    **{"<=": operator.le, ">": operator.gt, ">=": operator.ge},
}


def conditions(words: Sequence[str]) -> Condition | None:
    """Return what holds of a video of which all of these conditions hold; None if there are none.

    `name` (the video's) and `folder` (one or several of its folders) are compared by = and != with patterns such as
    `2026*`, `duration` with seconds, and `date`, when the file was last changed, with a date, as 2026, 2026-05-14 or
    2026-05-14T12:30. Raise UserError.
    """
    parsed = [_condition(word) for word in words]
    return (lambda video: all(holds(video) for holds in parsed)) if parsed else None


def search_where(find: Callable[[Any, int], list[list[Hit]]], vector: Any, k: int, holds: Condition) -> list[Hit]:
    """Return the k best hits, of videos of which the condition holds, for a query (1, D).

    `find(vector, k)` is a search without the condition; it is asked for more until there are enough. Of copies, the
    first one counts of which the condition holds.
    """
    wanted = k
    while True:
        hits = find(vector, wanted)[0]
        kept = [(hit, [video for video in (hit.video, *hit.copies) if holds(video)]) for hit in hits]
        found = [replace(hit, video=own[0], copies=tuple(own[1:])) for hit, own in kept if own][:k]
        if len(found) == k or len(hits) < wanted:
            return [replace(hit, rank=rank) for rank, hit in enumerate(found, 1)]
        wanted *= 4


def _condition(word: str) -> Condition:
    found = _FORM.fullmatch(word)
    if found is None or found["field"] not in _FIELDS:
        raise UserError(
            f"where {word}: not a condition such as 'duration > 60', 'name = *beach*', 'folder = holidays' or "
            "'date >= 2026-05'"
        )
    return _FIELDS[found["field"]](word, found["sign"], found["value"])


def _by_pattern(text_of: Callable[[IndexedVideo], str], form: str) -> Callable[[str, str, str], Condition]:
    def condition(word: str, sign: str, value: str) -> Condition:
        if sign not in ("=", "!="):
            raise UserError(f"where {word}: a pattern is compared by = or !=")
        return lambda video: fnmatch(text_of(video), form.format(value)) == (sign == "=")

    return condition


def _by_duration(word: str, sign: str, value: str) -> Condition:
    try:
        seconds = float(value)
    except ValueError as error:
        raise UserError(f"where {word}: {value} is not a number of seconds") from error
    return lambda video: video.duration is not None and _SIGNS[sign](video.duration, seconds)


def _by_date(word: str, sign: str, value: str) -> Condition:
    if not _DATE.fullmatch(value):
        raise UserError(f"where {word}: {value} is not a date such as 2026, 2026-05-14 or 2026-05-14T12:30")

    def holds(video: IndexedVideo) -> bool:
        changed = datetime.fromtimestamp(video.stamp.mtime_ns / 1e9).isoformat()
        return _SIGNS[sign](changed[: len(value)], value)

    return holds


_FIELDS: dict[str, Callable[[str, str, str], Condition]] = {
    "name": _by_pattern(lambda video: video.id, "{}"),
    "folder": _by_pattern(lambda video: f"{video.path.parent.as_posix()}/", "*/{}/*"),
    "duration": _by_duration,
    "date": _by_date,
}
