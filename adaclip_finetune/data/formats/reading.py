"""Rows of files: CSV, tab-separated tables, JSON, JSON Lines, lists of ids and pickles of plain data.

Whatever is wrong with a file is a UserError that names the file and the row.
"""

from __future__ import annotations

import csv
import functools
import logging
import pickle
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from adaclip_finetune.data.annotations import explain, shown
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import parse_json, read_json

_log = logging.getLogger(__name__)
_warn_once = functools.lru_cache(_log.warning)  # a file may be read twice
_adapter: Any = functools.lru_cache(TypeAdapter)  # which takes milliseconds to make
_DOUBLED = re.compile(r'"[^"]*(?:""[^"]*)+"')  # a cell in quotation marks, with those inside doubled


class Row(dict[str, Any]):
    """An object or a row of a file; `where` is its place, for messages. A key that is not there is a UserError."""

    def __init__(self, where: str, content: Any) -> None:
        if not isinstance(content, dict):
            raise UserError(f"{where}: expected an object, got {shown(content)}")
        super().__init__(content)
        self.where = where

    def __missing__(self, key: str) -> NoReturn:
        raise UserError(f"{self.where}: expected {key!r}, got only {', '.join(map(repr, self)) or 'nothing'}")


def table_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a table, which has these columns. The extension of the file says how it is written."""
    kind = path.suffix.lower()
    if kind in (".json", ".jsonl"):
        first = next(filter(str.strip, text_lines(path)), "")
        return json_list(path, read_json(path)) if first.lstrip().startswith("[") else json_lines(path)
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
        yield Row(f"{path}: line {line}", dict(zip(header, cells, strict=False)))


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
    """Yield the object of each line of a file of JSON Lines."""
    for line, text in enumerate(text_lines(path), start=1):
        if text.strip():
            yield Row(f"{path}: line {line}", parse_json(text, f"{path}: line {line}"))


def json_list(where: object, content: Any) -> Iterator[Row]:
    """Yield the objects of a list."""
    for number, entry in enumerate(checked(str(where), content, list[Any]), start=1):
        yield Row(f"{where}: entry {number}", entry)


def checked(where: str, value: Any, kind: Any) -> Any:
    """Return the value as pydantic reads it for this type. Raises UserError, which begins with `where`."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        raise UserError(explain(where, error)) from None


def read_ids(path: Path) -> list[str]:
    """Return the ids of a list, each once, in its order: a JSON list, a CSV with a column video_id, or one per line."""
    if path.suffix.lower() == ".json":
        ids = checked(str(path), read_json(path), list[str])
    else:
        rows = list(csv_cells(path))
        if rows and "video_id" in rows[0][1]:
            ids = [row["video_id"] for row in csv_rows(path, ["video_id"])]
        elif wrong := next((row for row in rows if len(row[1]) > 1), None):
            line, cells = wrong
            raise UserError(f"{path}: line {line}: expected one id per line, or a column video_id, got {shown(cells)}")
        else:
            ids = [cells[0] for _, cells in rows]
    found = list(dict.fromkeys(text for name in ids if (text := name.strip())))
    if not found:
        raise UserError(f"{path}: holds no id; expected one per line")
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


def _without_quotes(cell: str) -> str:
    """Return a cell as programs meant it that quote a cell only where it holds quotation marks."""
    return cell[1:-1].replace('""', '"') if _DOUBLED.fullmatch(cell) else cell
