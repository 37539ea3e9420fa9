"""Conditions on the videos that a search may find: `duration > 60`, `folder = holidays`, `season = 3`."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from fnmatch import translate
from math import isfinite
from pathlib import PurePath
from typing import Any, NamedTuple

from adaclip_finetune.errors import UserError

_FIELD = r"\w[\w.-]*"
_FORM = re.compile(rf"\s*(?P<field>{_FIELD})\s*(?P<sign>!=|<=|>=|==?|<|>)\s*(?P<value>.*\S)\s*", re.DOTALL)
_AND = re.compile(rf"\s+and\s+(?={_FIELD}\s*[!=<>])")
_DATE = re.compile(r"\d{4}(-\d\d(-\d\d(T\d\d(:\d\d)?)?)?)?")
_SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    **{"=": operator.eq, "!=": operator.ne, "<": operator.lt},
    **{"<=": operator.le, ">": operator.gt, ">=": operator.ge},
}


class Condition(NamedTuple):
    """What must hold of a field of a video. `sign` is one of =, !=, <, <=, > and >=.

    `holds` says whether it does, given what the video has in this field. No condition holds for a video that has
    nothing there.
    """

    field: str
    sign: str
    value: str
    holds: Callable[[Any], bool]


def conditions(words: Sequence[str]) -> list[Condition]:
    """Return the conditions that these texts state, each of them one or several with `and` between them.

    `name` (the video's) and `folder` (one or several of its folders) are compared by = and != with patterns such as
    `2026*`, `duration` with seconds, and `date`, when the file was last changed, with a date, as 2026, 2026-05-14 or
    2026-05-14T12:30. Every other field is one of the video's metadata: it is compared as a number if both sides are
    numbers, and otherwise as a text, by = and != with a pattern. Raise UserError.
    """
    return [_condition(part) for word in words for part in _AND.split(word)]


def columns(rows: Iterable[bytes]) -> dict[str, list[Any]]:
    """Return what each row of an index (JSON) has in each field, None for nothing: field → a list in order of rows."""
    found: dict[str, list[Any]] = {name: [] for name in _FIELDS}
    count = 0
    for count, line in enumerate(rows, 1):
        row = json.loads(line)
        for name, value in {**row.get("metadata", {}), **{name: own(row) for name, own in _FIELDS.items()}}.items():
            column = found.setdefault(name, [])
            column += [None] * (count - 1 - len(column)) + [value]
    return {name: column + [None] * (count - len(column)) for name, column in found.items()}


def rows_where(table: Mapping[str, list[Any]], stated: Iterable[Condition]) -> list[bool]:
    """Return for each row of `columns` whether all conditions hold. Raise UserError for a field that no row has."""
    rows = [True] * len(table["name"])
    for condition in stated:
        if condition.field not in table:
            known = ", ".join([*_FIELDS, *sorted(table.keys() - _FIELDS)])
            raise UserError(f"where {condition.field}: no video of this index has it; known are {known}")
        pairs = zip(rows, table[condition.field], strict=True)
        rows = [row and own is not None and condition.holds(own) for row, own in pairs]
    return rows


def _condition(word: str) -> Condition:
    found = _FORM.fullmatch(word)
    if found is None:
        raise UserError(
            f"where {word}: not a condition such as 'duration > 60', 'name = *beach*', 'folder = holidays', "
            "'date >= 2026-05' or 'season = 3'"
        )
    field, sign, value = found["field"], found["sign"].replace("==", "="), found["value"]
    return Condition(field, sign, value, _TESTS.get(field, _by_value)(word, sign, value))


def _matches(pattern: str) -> Callable[[str], bool]:
    """Return a test of a whole text, in which * stands for any characters and ? for one; case makes no difference."""
    compiled = re.compile(translate(pattern.replace("[", "[[]")), re.IGNORECASE)
    return lambda text: compiled.fullmatch(text) is not None


def _by_pattern(form: str) -> Callable[[str, str, str], Callable[[str], bool]]:
    def test(word: str, sign: str, value: str) -> Callable[[str], bool]:
        if sign not in ("=", "!="):
            raise UserError(f"where {word}: a pattern is compared by = or !=")
        matches = _matches(form.format(value))
        return lambda own: matches(own) == (sign == "=")

    return test


def _by_duration(word: str, sign: str, value: str) -> Callable[[float], bool]:
    seconds = _number(value)
    if seconds is None:
        raise UserError(f"where {word}: {value} is not a number of seconds")
    return lambda own: _SIGNS[sign](own, seconds)


def _by_date(word: str, sign: str, value: str) -> Callable[[str], bool]:
    if not _DATE.fullmatch(value):
        raise UserError(f"where {word}: {value} is not a date such as 2026, 2026-05-14 or 2026-05-14T12:30")
    return lambda own: _SIGNS[sign](own[: len(value)], value)


def _by_value(word: str, sign: str, value: str) -> Callable[[Any], bool]:
    """Of a list, such as tags, one entry must be equal for =, and none for !=."""
    number, matches, folded = _number(value), _matches(value), value.casefold()

    def equals(own: Any) -> bool:
        if isinstance(own, list):
            return any(map(equals, own))
        return (number is not None and _number(own) == number) or matches(str(own))

    def compares(own: Any) -> bool:
        if isinstance(own, list):
            return any(map(compares, own))
        own_number = _number(own)
        if number is None or own_number is None:
            return _SIGNS[sign](str(own).casefold(), folded)
        return _SIGNS[sign](own_number, number)

    return {"=": equals, "!=": lambda own: not equals(own)}.get(sign, compares)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if isfinite(number) else None


_TESTS: dict[str, Callable[[str, str, str], Callable[[Any], bool]]] = {
    "name": _by_pattern("{}"),
    "folder": _by_pattern("*/{}/*"),
    "duration": _by_duration,
    "date": _by_date,
}
_FIELDS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "name": lambda row: row["id"],
    "folder": lambda row: f"{PurePath(row['path']).parent.as_posix()}/",
    "duration": lambda row: row["duration"],
    "date": lambda row: datetime.fromtimestamp(row["mtime_ns"] / 1e9).isoformat(),
}
