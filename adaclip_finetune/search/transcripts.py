"""What is said in videos: subtitles beside them (SRT, WebVTT), in SQLite's full-text index (FTS5).

A line is found if it has at least half of what a query says, where a word counts by how rare it is among all lines (the
idf of BM25, Robertson and Zaragoza 2009): words like "the", which most lines have, find nothing by themselves.
"""

from __future__ import annotations

import html
import math
import os
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.query import terms_of
from adaclip_finetune.strict_json import decoded

TRANSCRIPTS = "transcripts.sqlite"  # in the folder of an index
ENDINGS = (".srt", ".vtt")

_TIME = r"(?:(\d+):)?(\d\d?):(\d\d)[.,](\d{1,3})"
_TIMES = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?")
_TAG = re.compile(r"<[^>]*>|\{\\[^}]*\}")
_WITHOUT_SPACES = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")  # Chinese and Japanese characters
_TABLES = """
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, video TEXT, size INTEGER, mtime_ns INTEGER, first INTEGER, last INTEGER
);
CREATE VIRTUAL TABLE IF NOT EXISTS lines USING fts5(
    words, video UNINDEXED, start UNINDEXED, end UNINDEXED, text UNINDEXED,
    tokenize="unicode61 remove_diacritics 2 categories 'L* N* Co Mn Mc'"
);
"""


class FoundLine(NamedTuple):
    """A line of a transcript. `start` and `end` are in seconds."""

    start: float
    end: float
    text: str


class TranscriptReport(NamedTuple):
    """What `update_transcripts` did: files that were read, lines that are there now, and files that are broken."""

    read: int
    lines: int
    problems: list[str]


def transcripts_beside(videos: Iterable[Path]) -> dict[Path, list[Path]]:
    """Return the transcripts of each video that has some: files of its name, such as beach.srt or beach.en.vtt.

    Of files that differ in nothing but .srt and .vtt, the first counts.
    """
    by_stem = {video.with_suffix(""): video for video in videos}
    found: dict[Path, list[Path]] = {}
    for folder in dict.fromkeys(stem.parent for stem in by_stem):
        try:
            names = sorted(name for name in os.listdir(folder) if name.lower().endswith(ENDINGS))  # noqa: PTH208
        except OSError:
            continue  # reading the videos tells the reason
        for path in {name[:-4]: folder / name for name in reversed(names)}.values():
            stem = path.with_suffix("")
            if video := by_stem.get(stem) or by_stem.get(stem.with_suffix("")):
                found.setdefault(video, []).append(path)
    return found


def parse_transcript(content: str) -> list[FoundLine]:
    """Return the lines of an SRT or WebVTT file, without markup.

    Subtitles that roll, as those that YouTube makes, repeat a line in the next one; it is returned once.
    """
    lines: list[FoundLine] = []
    shown: list[str] = []  # by the line before
    texts: list[str] | None = None  # of the line that is being read
    start = end = until = 0.0

    def finish() -> None:
        nonlocal shown, until
        if texts:
            if new := [text for text in texts if text not in shown or start > until + 0.1]:
                lines.append(FoundLine(start, end, " ".join(new)))
            shown, until = texts, end

    for line in content.splitlines():
        if times := _TIMES.fullmatch(line):
            if texts and texts[-1].isdecimal():
                texts.pop()  # the number of this line, where no empty line separates them
            finish()
            start, end = _seconds(times.groups()[:4]), _seconds(times.groups()[4:])
            texts = []
        elif not line:
            finish()
            texts = None
        elif texts is not None and (text := " ".join(html.unescape(_TAG.sub("", line)).split())):
            texts.append(text)
    finish()
    return lines


def _seconds(parts: Sequence[str | None]) -> float:
    hours, minutes, seconds, fraction = parts
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + int(seconds or 0) + float(f"0.{fraction}")


def update_transcripts(
    folder: Path, transcripts: Mapping[str, Sequence[Path]], videos: Iterable[str], sync: bool = False
) -> TranscriptReport | None:
    """Bring the transcripts in the folder of an index up to date: id of a video → its files. Return None if there were
    and are none.

    Files that have not changed are kept. `videos` are the ids of all videos of the collection; transcripts of others
    are dropped if `sync`. Raise UserError.
    """
    if not transcripts and not (folder / TRANSCRIPTS).exists():
        return None
    wanted = {os.fsencode(file): video for video, files in transcripts.items() for file in files}
    there = set(videos)
    problems, read = [], 0
    with _opened(folder / TRANSCRIPTS) as db:
        db.executescript(_TABLES)
        with db:
            known = {file: facts for file, *facts in db.execute("SELECT * FROM files").fetchall()}
            for file, (video, *_) in known.items():
                if file not in wanted and (sync or video in there):
                    _drop(db, file)
            for file, video in wanted.items():
                try:
                    path = Path(os.fsdecode(file))
                    facts = [video, path.stat().st_size, path.stat().st_mtime_ns]
                    if file in known and known[file][:3] == facts:
                        continue
                    lines = parse_transcript(_text(path))
                    if not lines:
                        raise UserError(f"{path}: has no line with times, such as 00:01:02,500 --> 00:01:04,000")
                except (OSError, UserError) as error:
                    lines = []
                    problems.append(str(error))
                if file in known:
                    _drop(db, file)
                if lines:
                    _add(db, file, facts, lines)
                    read += 1
        (count,) = db.execute("SELECT count(*) FROM lines").fetchone()
    return TranscriptReport(read, count, problems)


def merge_transcripts(parts: Iterable[Path], folder: Path) -> None:
    """Write the transcripts of all parts of an index into its folder, in place of those there. Raise UserError."""
    (folder / TRANSCRIPTS).unlink(missing_ok=True)
    paths = [path for part in parts if (path := part / TRANSCRIPTS).exists()]
    if not paths:
        return
    with _opened(folder / TRANSCRIPTS) as db:
        db.executescript(_TABLES)
        with db:
            for path in paths:
                with _opened(path, "?mode=ro") as own:
                    for file, *facts, first, last in own.execute("SELECT * FROM files ORDER BY path"):
                        select = "SELECT start, end, text FROM lines WHERE rowid BETWEEN ? AND ? ORDER BY rowid"
                        _add(db, file, facts, [FoundLine(*line) for line in own.execute(select, (first, last))])


class Transcripts:
    """The transcripts of an index."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / TRANSCRIPTS

    def count(self) -> int:
        """Return the number of lines; 0 if there are no transcripts. Raise UserError."""
        if not self.path.exists():
            return 0
        with _opened(self.path, "?mode=ro") as db:
            return int(db.execute("SELECT count(*) FROM lines").fetchone()[0])

    def need(self) -> None:
        """Raise UserError if there are no transcripts."""
        if not self.count():
            way_out = "put .srt or .vtt files beside the videos, named like them, and run `adaclip index` again"
            raise UserError(f"{self.path.parent}: has no transcripts; {way_out}")

    def find(self, query: str) -> dict[str, FoundLine]:
        """Return the ids of the videos in which something is said that a query says, best first, with the best line.

        Of a query that combines texts, those that are added count. Any text is a query. Raise UserError.
        """
        said = " ".join(term.text for term in terms_of(query) if term.weight > 0)
        words = {_quoted(word) for word in said.split() if any(map(str.isalnum, word))}
        with _opened(self.path, "?mode=ro") as db:
            (total,) = db.execute("SELECT count(*) FROM lines").fetchone()
            rows = {word: [row for (row,) in db.execute("SELECT rowid FROM lines(?)", (word,))] for word in words}
            counts = {word: max(1, len(own)) for word, own in rows.items()}
            idf = {word: math.log(1 + (total - count + 0.5) / (count + 0.5)) for word, count in counts.items()}
            weights: defaultdict[int, float] = defaultdict(float)
            for word, own in rows.items():
                for row in own:
                    weights[row] += idf[word]
            enough = sum(idf.values()) / 2
            found: dict[str, FoundLine] = {}
            if not weights:
                return found
            select = "SELECT rowid, video, start, end, text FROM lines(?) ORDER BY rank, rowid"
            for row, video, *line in db.execute(select, (" OR ".join(sorted(words)),)):
                if weights[row] >= enough:
                    found.setdefault(video, FoundLine(*line))
        return found


def _add(db: sqlite3.Connection, file: bytes, facts: Sequence[object], lines: Sequence[FoundLine]) -> None:
    (last,) = db.execute("SELECT coalesce(max(rowid), 0) FROM lines").fetchone()
    rows = [(last + n, _spaced(line.text), facts[0], *line) for n, line in enumerate(lines, 1)]
    db.executemany("INSERT INTO lines (rowid, words, video, start, end, text) VALUES (?, ?, ?, ?, ?, ?)", rows)
    db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)", (file, *facts, last + 1, last + len(lines)))


def _drop(db: sqlite3.Connection, file: bytes) -> None:
    (span,) = db.execute("SELECT first, last FROM files WHERE path = ?", (file,)).fetchall()
    db.execute("DELETE FROM lines WHERE rowid BETWEEN ? AND ?", span)
    db.execute("DELETE FROM files WHERE path = ?", (file,))


def _text(path: Path) -> str:
    content = path.read_bytes()
    is_utf_16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    return decoded(content, path, "utf-16" if is_utf_16 else "utf-8-sig").replace("\0", "")


def _spaced(text: str) -> str:
    """Return the text with spaces around characters of scripts that are written without them: each is a word."""
    return _WITHOUT_SPACES.sub(r" \g<0> ", text)


def _quoted(word: str) -> str:
    """Return a word as FTS5 takes it, whatever is in it: a phrase, in which nothing has a meaning of its own."""
    plain = _spaced(word).replace("\0", "").encode("utf-8", "ignore").decode()
    return '"{}"'.format(plain.replace('"', '""'))


@contextmanager
def _opened(path: Path, how: str = "") -> Iterator[sqlite3.Connection]:
    """Open the file of transcripts. Raise UserError where this Python's SQLite cannot, or the file is damaged."""
    try:
        with closing(sqlite3.connect(path.absolute().as_uri() + how, uri=True)) as db:
            yield db
    except sqlite3.OperationalError as error:
        if "fts5" in str(error):
            raise UserError(f"{path}: this Python's SQLite has no FTS5, which transcripts need") from error
        raise UserError(f"{path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: is damaged ({error}); delete it, and run `adaclip index` again") from error
