"""What is said in videos: subtitles are read, kept up to date, and found."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.transcripts import (
    FoundLine,
    Transcripts,
    parse_transcript,
    transcripts_beside,
    update_transcripts,
)


def srt(*lines: str) -> str:
    """Return subtitles, of which line n lasts from second n to second n + 1."""
    return "".join(f"{n}\n00:00:{n:02},000 --> 00:00:{n + 1:02},000\n{line}\n\n" for n, line in enumerate(lines))


@pytest.fixture
def said(tmp_path: Path) -> Callable[..., Transcripts]:
    """Write subtitles, update the index i with them, and return its transcripts: id of a video → its lines."""

    def write(**videos: tuple[str, ...]) -> Transcripts:
        (tmp_path / "i").mkdir(exist_ok=True)
        for name, lines in videos.items():
            (tmp_path / f"{name}.srt").write_text(srt(*lines))
        update_transcripts(tmp_path / "i", {name: [tmp_path / f"{name}.srt"] for name in videos}, videos)
        return Transcripts(tmp_path / "i")

    return write


SRT = """1\r
00:00:01,500 --> 00:00:03,250\r
<i>Two dogs</i>\r
run &amp; bark.\r
\r
2
01:00:00,0 --> 01:00:01,5  X1:40 X2:600
{\\an8}To the sea
\x20
3
01:00:02,000 --> 01:00:03,000
3

4
01:00:02,000 --> 01:00:03,000

"""
VTT = """WEBVTT - made by hand

NOTE
00:00 is when it starts

STYLE
::cue { color: red }

intro
00:01.500 --> 00:03.250 align:start position:0%
<v Ann>Two <00:02.000><c>dogs</c></v>

01:00:00.000 --> 01:00:01.500
a --> b
"""
ROLLING = """WEBVTT

00:00:00.320 --> 00:00:02.000
\x20
two<00:00:00.700><c> dogs</c>

00:00:02.000 --> 00:00:02.010
two dogs
\x20

00:00:02.010 --> 00:00:04.000
two dogs
run<00:00:02.500><c> away</c>

00:00:09.000 --> 00:00:10.000
run away
"""


@pytest.mark.parametrize(("content", "lines"), [
    (SRT, [(1.5, 3.25, "Two dogs run & bark."), (3600, 3601.5, "To the sea"), (3602, 3603, "3")]),
    (VTT, [(1.5, 3.25, "Two dogs"), (3600, 3601.5, "a --> b")]),
    (ROLLING, [(0.32, 2, "two dogs"), (2.01, 4, "run away"), (9, 10, "run away")]),
    ("WEBVTT\n\n", []),
    ("no subtitles\nat all", []),
    (srt("the dog runs", "the dog"), [(0, 1, "the dog runs"), (1, 2, "the dog")]),
])  # fmt: skip
def test_lines_with_their_times(content: str, lines: list[tuple[float, float, str]]) -> None:
    assert parse_transcript(content) == [FoundLine(*line) for line in lines]


def test_which_files_belong_to_a_video(tmp_path: Path) -> None:
    names = ["beach.srt", "beach.vtt", "beach.en.VTT", "beach.pt-BR.srt", "beach.2.srt", "other.srt", "deep/a.srt"]
    (tmp_path / "deep").mkdir()
    for name in names:
        (tmp_path / name).touch()
    videos = [tmp_path / name for name in ("beach.mp4", "beach.2.mp4", "none.mp4", "deep/a.mkv", "gone/a.mp4")]
    found = transcripts_beside(videos)
    assert {video.name: sorted(path.name for path in files) for video, files in found.items()} == {
        "beach.mp4": ["beach.en.VTT", "beach.pt-BR.srt", "beach.srt"],
        "beach.2.mp4": ["beach.2.srt"],
        "a.mkv": ["a.srt"],
    }


def test_only_what_has_changed_is_read_again(tmp_path: Path) -> None:
    def update(*there: str, **how: Any) -> tuple[int, int]:
        report = update_transcripts(tmp_path / "i", {name: [tmp_path / f"{name}.srt"] for name in there}, ids, **how)
        assert report is not None and report.problems == []
        return report.read, report.lines

    ids = ["a", "b", "c"]
    (tmp_path / "i").mkdir()
    assert update_transcripts(tmp_path / "i", {}, ids) is None and not list((tmp_path / "i").iterdir())
    for name, lines in {"a": ("dog", "cat"), "b": ("bird",), "c": ("fish",)}.items():
        (tmp_path / f"{name}.srt").write_text(srt(*lines))
    assert update("a", "b", "c") == (3, 4)
    assert update("a", "b", "c") == (0, 4)
    (tmp_path / "a.srt").write_text(srt("sheep"))
    assert update("a", "b", "c") == (1, 3)
    transcripts = Transcripts(tmp_path / "i")
    assert (transcripts.find("dog"), list(transcripts.find("sheep"))) == ({}, ["a"])
    assert update("a", "c") == (0, 2), "the transcript is gone"
    ids = ["a"]
    assert update("a") == (0, 2), "the video is gone, which an index keeps"
    assert update("a", sync=True) == (0, 1)


def test_broken_files_are_named_and_passed_over(tmp_path: Path) -> None:
    (tmp_path / "good.srt").write_text(srt("a dog"), encoding="utf-16")
    (tmp_path / "latin.srt").write_bytes(srt("café").encode("latin-1"))
    (tmp_path / "empty.vtt").write_text("WEBVTT\n")
    (tmp_path / "folder.srt").mkdir()
    files = {name: [tmp_path / name] for name in ("good.srt", "latin.srt", "empty.vtt", "folder.srt", "gone.srt")}
    report = update_transcripts(tmp_path, files, files)
    assert report is not None and (report.read, report.lines) == (1, 1)
    for name, fact in {"latin.srt": "UTF-8", "empty.vtt": "no line", "folder.srt": "", "gone.srt": ""}.items():
        assert [fact in problem for problem in report.problems if name in problem] == [True], name


def test_a_line_is_found_by_half_of_what_is_asked(said: Callable[..., Transcripts]) -> None:
    filler = tuple(f"and the word {number}" for number in range(20))
    transcripts = said(
        a=("the dog runs along the water", "the dog"), b=("the water and the dog sleep",), c=("the cat", *filler)
    )
    found = transcripts.find("the dog runs")
    assert list(found) == ["a"] and found["a"] == (0.0, 1.0, "the dog runs along the water")
    assert list(transcripts.find("dog")) == ["a", "b"] and transcripts.find("dog")["a"].text == "the dog"
    assert transcripts.find("the whale") == transcripts.find("whale") == {}
    assert list(transcripts.find('"cat" - "dog"')) == ["c"], "what is subtracted is not looked for"
    assert transcripts.count() == 24


@pytest.mark.parametrize(("line", "query"), [
    ("Un café crème", "CAFE"),
    ("Un cafe\u0301", "café"),
    ("ЖИЗНЬ прекрасна", "жизнь"),
    ("東京タワーに行く", "東京"),
    ("हिन्दी में", "हिन्दी"),
    ("don't stop", "don't"),
    ("rock 'n' roll", 'rock " roll'),
    ("a 3.5 mm jack", "3.5"),
])  # fmt: skip
def test_words_of_other_languages(said: Callable[..., Transcripts], line: str, query: str) -> None:
    transcripts = said(a=("nothing of it",), b=(line,))
    assert list(transcripts.find(query)) == ["b"]
    assert transcripts.find(query)["b"].text == line


@pytest.mark.parametrize(("query", "videos"), [
    *((query, set()) for query in ("", " ", '"', "'", "*", "(", "-", "+ +", "\ud800", "NEAR(dog", "words:dog")),
    *((query, {"a"}) for query in ("dog*", "^dog", "\0dog", "\ud800dog", "dog;--", '"dog" + "')),
    *((query, {"b"}) for query in ("NOT", "AND", "NEAR")),
    ("dog NOT", {"a", "b"}),
])  # fmt: skip
def test_any_text_is_a_query(said: Callable[..., Transcripts], query: str, videos: set[str]) -> None:
    assert set(said(a=("a dog",), b=("and not near words",)).find(query)) == videos


def test_a_file_that_is_damaged_and_an_sqlite_without_fts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transcripts.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="damaged"):
        Transcripts(tmp_path).count()
    (tmp_path / "transcripts.sqlite").unlink()
    assert Transcripts(tmp_path).count() == 0
    with pytest.raises(UserError, match=r"\.srt"):
        Transcripts(tmp_path).need()

    class Without(sqlite3.Connection):
        def executescript(self, script: str) -> Any:
            raise sqlite3.OperationalError("no such module: fts5")

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **how: connect(*given, factory=Without, **how))
    (tmp_path / "a.srt").write_text(srt("a dog"))
    with pytest.raises(UserError, match="FTS5"):
        update_transcripts(tmp_path, {"a": [tmp_path / "a.srt"]}, ["a"])
