"""Rows of files: CSV, tab-separated tables, JSON, JSON Lines, lists of ids and pickles of plain data.

Whatever is wrong with a file is a UserError that names the file and the row.
"""

from __future__ import annotations

import csv
import functools
import logging
import math
import pickle
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import parse_json, read_json

Row = tuple[str, dict[str, Any]]  # the place of a row, for messages; its values by column
Kind = type[Any] | tuple[type[Any], ...]

_log = logging.getLogger(__name__)
_warn_once = functools.lru_cache(_log.warning)  # a file may be read twice
_DOUBLED = re.compile(r'"[^"]*(?:""[^"]*)+"')  # a cell in quotation marks, with those inside doubled


def table_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a table, which has these columns. The extension of the file says how it is written."""
    kind = path.suffix.lower()
    if kind in (".json", ".jsonl"):
        first = next(filter(str.strip, text_lines(path)), "")
        return json_list(path) if first.lstrip().startswith("[") else json_lines(path)
    if kind in (".csv", ".tsv", ".txt"):
        return csv_rows(path, columns, "," if kind == ".csv" else "\t")
    raise UserError(f"{path}: expected a file named .csv, .tsv, .txt, .json or .jsonl, which says how it is written")


def csv_rows(path: Path, columns: Sequence[str], delimiter: str = ",", has_header: bool = True) -> Iterator[Row]:
    """Yield the rows of a table, whose header names at least these columns, or which has them without a header."""
    lines = csv_cells(path, delimiter)
    line, header = next(lines, (1, [])) if has_header else (0, columns)
    header = [name.strip() for name in header]
    if wrong := [name for name in columns if header.count(name) != 1]:
        got = ", ".join(header) or "nothing"
        raise UserError(f"{path}: line {line}: expected a header with one column {wrong[0]!r}, got {got}")
    needed = 1 + max(map(header.index, columns))
    for line, cells in lines:
        if len(cells) < needed or any(cells[len(header) :]):
            raise UserError(f"{path}: line {line}: expected {len(header)} columns, got {len(cells)}: {shown(cells)}")
        yield f"{path}: line {line}", dict(zip(header, cells, strict=False))


def csv_cells(path: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the cells of each row that is not blank, header or not.

    Where commas separate the cells, quotation marks enclose a cell and are doubled inside it. A mark that is not closed
    is an error, and rows that go over several lines are reported. Where tabs separate them, a row is a line, and
    quotation marks are ordinary characters, except around a cell in which they are doubled; but a file whose first line
    begins with a quotation mark is read as if it had commas.
    """
    line = 0  # the last one of the rows so far
    first_long, num_long = 0, 0  # rows of several lines
    texts = text_lines(path)
    first = next(texts, "")
    quoted = delimiter == "," or first.startswith('"')
    how: dict[str, Any] = {} if quoted else {"quoting": csv.QUOTE_NONE}
    reader = csv.reader(chain([first], texts), delimiter=delimiter, strict=True, **how)
    try:
        for cells in reader:
            if reader.line_num - line > 1:
                first_long, num_long = first_long or line + 1, num_long + 1
            line = reader.line_num
            if any(map(str.strip, cells)):
                yield line, cells if quoted else [_without_quotes(cell) for cell in cells]
    except csv.Error as error:
        raise UserError(
            f"{path}: line {line + 1}: cannot be read as a row ({error}); a quotation mark that opens a cell must be "
            "closed at its end, and those inside must be doubled"
        ) from None
    if num_long:
        _warn_once(
            f"{path}: {num_long:,} rows go over several lines, because a quotation mark opens a cell; the first begins "
            f"in line {first_long}"
        )


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their ends."""
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for text in file:
                yield text
                line += 1
    except UnicodeDecodeError:
        raise UserError(f"{path}: after line {line}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def json_lines(path: Path) -> Iterator[Row]:
    """Yield the objects of a file of JSON Lines."""
    for line, text in enumerate(text_lines(path), start=1):
        if text.strip():
            where = f"{path}: line {line}"
            yield where, expect(where, parse_json(text, where), dict, "an object in each line")


def json_list(path: Path, content: Any = None, name: str = "") -> Iterator[Row]:
    """Yield the objects of a JSON list: of the file, or `content`, which is called `name` in it."""
    place = f"{path}: {name}" if name else str(path)
    entries = expect(place, read_json(path) if content is None else content, list, "a list of objects")
    for number, entry in enumerate(entries, start=1):
        where = f"{place}{',' if name else ':'} entry {number}"
        yield where, expect(where, entry, dict, "an object")


def json_object(path: Path, content: Any = None) -> Iterator[tuple[str, str, Any]]:
    """Yield place, name and value of what a JSON object of videos holds: of the file, or `content`."""
    videos = expect(str(path), read_json(path) if content is None else content, dict, "an object of videos")
    for name, value in videos.items():
        yield f"{path}: video {name!r}", expect(f"{path}: {name!r}", name, str, "the name of a video"), value


def read_ids(path: Path) -> list[str]:
    """Return the ids of a list, each once, in its order: a JSON list, a CSV with a column video_id, or one a line."""
    if path.suffix.lower() == ".json":
        content = expect(str(path), read_json(path), list, "a list of ids")
        ids = [expect(f"{path}: id {row}", value, str, "a text") for row, value in enumerate(content, start=1)]
    else:
        rows = list(csv_cells(path))
        if rows and "video_id" in rows[0][1]:
            ids = [row["video_id"] for _, row in csv_rows(path, ["video_id"])]
        elif wrong := [row for row in rows if len(row[1]) > 1]:
            line, cells = wrong[0]
            raise UserError(f"{path}: line {line}: expected one id a line, or a column video_id, got {shown(cells)}")
        else:
            ids = [cells[0] for _, cells in rows]
    found = list(dict.fromkeys(text for name in ids if (text := name.strip())))
    if not found:
        raise UserError(f"{path}: holds no id; expected one a line")
    return found


def read_plain_pickle(path: Path) -> Any:
    """Return what a pickle of lists, dicts, text and numbers holds. A pickle that asks for any code is refused."""
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="utf-8").load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle fails in whatever way its bytes lead to
        raise UserError(
            f"{path}: expected a pickle of plain lists, dicts and text ({error}); nothing was run"
        ) from None


class _PlainUnpickler(pickle.Unpickler):
    """Unpickling calls what the file names; here it may name nothing."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def expect(where: str, value: Any, kind: Kind, words: str) -> Any:
    """Return the value if it is of that kind. Raise a UserError that says in `words` what was expected if not."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: expected {words}, got {shown(value)}")
    return value


def member(where: str, row: dict[str, Any], key: str, kind: Kind = str, words: str = "a text") -> Any:
    """Return `row[key]` if it is there and of that kind. Raises UserError."""
    if key not in row:
        raise UserError(f"{where}: expected {key!r} ({words}), got only {', '.join(map(repr, row)) or 'nothing'}")
    return expect(f"{where}: {key!r}", row[key], kind, words)


def texts(where: str, value: Any) -> list[str]:
    """Return a text, or a list of texts, as a list. Raises UserError."""
    if isinstance(value, str):
        return [value]
    expect(where, value, list, "a text or a list of texts")
    return [expect(f"{where}: caption {row}", text, str, "a text") for row, text in enumerate(value, start=1)]


def seconds(where: str, value: Any) -> float:
    """Return a number of seconds from 0 up, given as a number or a text. Raises UserError."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < 1e9:
        raise UserError(f"{where}: expected a number of seconds from 0 up, got {shown(value)}")
    return number


def time_span(where: str, pair: Any) -> tuple[float, float]:
    """Return [start, end] in seconds, from 0 up, as a tuple. Raises UserError."""
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise UserError(f"{where}: expected [start, end] in seconds, got {shown(pair)}")
    return seconds(where, pair[0]), seconds(where, pair[1])


def cut(where: str, pair: Any) -> tuple[float, float]:
    """Return a time span that lasts. Raises UserError."""
    start, end = time_span(where, pair)
    if start >= end:
        raise UserError(f"{where}: expected an end after the start, got {start:g} to {end:g} seconds")
    return start, end


def shown(value: Any) -> str:
    """Return the beginning of a value, for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _without_quotes(cell: str) -> str:
    """Return a cell as programs meant it that quote a cell only where it holds quotation marks."""
    return cell[1:-1].replace('""', '"') if _DOUBLED.fullmatch(cell) else cell
