"""Conditions on the videos that a search may find."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.where import conditions, search_where


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def video(name: str = "beach.mp4", folder: str = "/my/holidays/2026", duration: float | None = 61.5) -> Any:
    stamp = SimpleNamespace(mtime_ns=1_778_761_800 * 10**9)  # 2026-05-14T12:30
    return SimpleNamespace(id=name, path=Path(folder) / name, duration=duration, stamp=stamp)


@pytest.mark.parametrize(("word", "expected"), [
    ("duration > 60", True),
    ("duration<=61.5", True),
    ("duration < 61.5", False),
    ("name = *beach*", True),
    ("name != *beach*", False),
    ("name = each*", False),
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
])  # fmt: skip
def test_a_condition(word: str, expected: bool) -> None:
    holds = conditions([word])
    assert holds is not None and holds(video()) is expected


def test_all_conditions_must_hold() -> None:
    assert conditions([]) is None
    holds = conditions(["duration > 60", "name = *.mkv"])
    assert holds is not None and not holds(video()) and holds(video("a.mkv"))
    assert not holds(video("a.mkv", duration=None)), "an unknown length is not longer than a minute"


@pytest.mark.parametrize(
    "word", ["", "long", "size > 3", "duration > a minute", "name > a", "date = yesterday", "date = 2026-5"]
)
def test_what_is_no_condition_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="where"):
        conditions([word])


def test_a_search_asks_for_more_until_there_are_enough() -> None:
    from adaclip_finetune.search.index import Hit

    ranking = [Hit(video(f"{number}.mp4", duration=number), 1 - number / 100, number + 1) for number in range(50)]
    ranking[10] = Hit(video("short.mp4", duration=1), 0.9, 11, copies=(video("long.mp4", duration=99),))
    asked = []

    def find(vector: Any, k: int) -> list[list[Hit]]:
        asked.append(k)
        return [ranking[:k]]

    holds = conditions(["duration >= 30"])
    assert holds is not None
    found = search_where(find, None, 3, holds)
    assert [(hit.rank, hit.video.id) for hit in found] == [(1, "long.mp4"), (2, "30.mp4"), (3, "31.mp4")]
    assert asked == [3, 12, 48] and found[0].copies == ()
    assert len(search_where(find, None, 40, holds)) == 21
