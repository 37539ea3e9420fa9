"""Conditions on the videos that a search may find."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.where import columns, conditions, rows_where


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def row(
    name: str = "beach.mp4", folder: str = "/my/holidays/2026", duration: float | None = 61.5, **facts: Any
) -> bytes:
    mtime = 1_778_761_800 * 10**9  # 2026-05-14T12:30
    metadata = {"metadata": facts} if facts else {}
    return json.dumps(
        {"id": name, "path": f"{folder}/{name}", "duration": duration, "mtime_ns": mtime, **metadata}
    ).encode()


def which(words: list[str], *rows: bytes) -> list[bool]:
    return rows_where(columns(rows), conditions(words))


@pytest.mark.parametrize(("word", "expected"), [
    ("duration > 60", True),
    ("duration<=61.5", True),
    ("duration < 61.5", False),
    ("duration == 61.5", True),
    ("name = *beach*", True),
    ("name = BEACH.mp?", True),
    ("name != *beach*", False),
    ("name = " + 40 * "*" + "x", False),
    ("name = " + 40 * "*?" + "x", False),
    ("name = each*", False),
    ("name = [b]each.mp4", False),
    ("folder = holidays", True),
    ("folder = holidays/2026", True),
    ("folder = holi*", True),
    ("folder = holi", False),
    ("folder != work", True),
    ("date = 2026", True),
    ("date = 2026-05-14", True),
    ("date >= 2026-05-14T12:30", True),
    ("date <= 2026-05", True),
    ("date < 2026-05-14", False),
    ("date > 2026-05-13", True),
    ("season = 3", True),
    ("season >= 3.5", False),
    ("season != 4", True),
    ("title = cats and dogs*", True),
    ("title = *[hd]", True),
    ("title = cats", False),
    ("title < D", True),
    ("upload_date >= 20260101", True),
    ("tags = dog", True),
    ("tags != dog", False),
    ("tags != bird", True),
    ("live = true", True),
    ("duration > 60 and season = 3", True),
    ("title = cats and dogs* and season = 4", False),
])  # fmt: skip
def test_a_condition(word: str, expected: bool) -> None:
    facts = {
        "season": 3,
        "title": "Cats and dogs [HD]",
        "upload_date": "20260514",
        "tags": ["cat", "Dog"],
        "live": True,
    }
    assert which([word], row(**facts)) == [expected]


def test_all_conditions_must_hold() -> None:
    rows = row(), row("a.mkv"), row("b.mkv", duration=None)
    assert which([], *rows) == [True, True, True]
    assert which(["duration > 60", "name = *.mkv"], *rows) == [False, True, False]
    assert which(["duration > 60"]) == []


def test_no_condition_holds_for_what_is_not_known() -> None:
    rows = row(), row(season=2), row(), row(season="two", camera="north")
    for word, expected in {
        "season = 2": [False, True, False, False],
        "season != 2": [False, False, False, True],
        "season < z": [False, True, False, True],
        "camera = *": [False, False, False, True],
    }.items():
        assert which([word], *rows) == expected


def test_metadata_do_not_hide_what_is_known_of_the_file() -> None:
    assert which(["duration > 60"], row(duration=61, **{"date": "never"})) == [True]
    assert which(["date = 2026"], row(**{"date": "never"})) == [True]


@pytest.mark.parametrize(
    "word", ["", "long", "> 3", "duration > a minute", "name > a", "date = yesterday", "date = 2026-5"]
)
def test_what_is_no_condition_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="where"):
        conditions([word])


def test_a_field_that_no_video_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"sesaon.*name, folder, duration, date, camera, season"):
        which(["sesaon = 3"], row(season=3), row(camera="north"))
