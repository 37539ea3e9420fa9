"""Files of annotations, read with the file and the row in every message."""

from __future__ import annotations

import csv
import math
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from adaclip_finetune.data.extensions import VIDEO_EXTENSIONS
from adaclip_finetune.data.formats.clip import SPLITS
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import parse_json, read_json

_VIDEO_FILE = re.compile(rf"(.+)\.({'|'.join(VIDEO_EXTENSIONS)})", re.IGNORECASE | re.DOTALL)


def add_split_flags(parser: ArgumentParser, what: str) -> None:
    """--train, --val and --test, each a file; `what` tells what it holds of the split."""
    for split in SPLITS:
        parser.add_argument(f"--{split}", metavar="FILE", type=Path, help=f"{split}: {what}")


def given_splits(arguments: Namespace, suffix: str = "") -> dict[str, Path]:
    """The files of --train, --val, --test (or --train-ids and so on with a suffix) that were given."""
    given = {split: getattr(arguments, split + suffix) for split in SPLITS}
    return {split: path for split, path in given.items() if path is not None}


def needed_splits(arguments: Namespace) -> dict[str, Path]:
    """`given_splits`, of which there must be one. Raises UserError."""
    if not (given := given_splits(arguments)):
        raise UserError("nothing to convert: give at least one of --train FILE, --val FILE, --test FILE")
    return given


def read_csv(
    path: Path, columns: Sequence[str], optional: Sequence[str] = (), delimiter: str = ","
) -> Iterator[tuple[int, list[str]]]:
    """Line number and the values of these columns, by a header; a column that is `optional` and not there gives ''."""
    rows = csv_lines(path, delimiter)
    line, header = next(rows, (1, []))
    header = [name.strip() for name in header]
    if missing := [name for name in columns if name not in header]:
        got = ", ".join(header) or "nothing"
        raise UserError(f"{path}: line {line}: expected a header with the column {missing[0]!r}, got {got}")
    places = [header.index(name) if name in header else None for name in (*columns, *optional)]
    width = 1 + max(place for place in places if place is not None)
    for line, row in rows:
        if not row:
            continue
        if len(row) < width:
            raise UserError(f"{path}: line {line}: expected {len(header)} columns, got {len(row)}: {shown(row)}")
        yield line, ["" if place is None else row[place] for place in places]


def csv_lines(path: Path, delimiter: str = ",", quoted: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row, header or not. Raises UserError."""
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
            reader = csv.reader(file, delimiter=delimiter, quoting=quoting)
            for row in reader:
                line = reader.line_num
                yield line, row
    except (UnicodeDecodeError, csv.Error) as error:
        what = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"no row of a table ({error})"
        raise UserError(f"{path}: after line {line}: {what}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line. Raises UserError."""
    line = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    where = f"{path}: line {line}"
                    yield line, expect(where, parse_json(text, where), dict, "an object {…} a line")
    except UnicodeDecodeError:
        raise UserError(f"{path}: after line {line}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_ids(path: Path) -> list[str]:
    """The ids of a list, each once, in its order: JSON, a csv with a column `video_id`, or one a line."""
    if path.suffix.lower() == ".json":
        content = expect(str(path), read_json(path), list, "a list of ids")
        ids = [expect(f"{path}: id {row}", value, str, "a text") for row, value in enumerate(content, start=1)]
    else:
        rows = [(line, row) for line, row in csv_lines(path) if any(map(str.strip, row))]
        column = rows[0][1].index("video_id") if rows and "video_id" in rows[0][1] else None
        for line, row in rows:
            if len(row) > 1 and (column is None or column >= len(row)):
                raise UserError(f"{path}: line {line}: expected one id a line, or a column video_id, got {shown(row)}")
        ids = [row[column or 0] for _, row in rows[column is not None :]]
    found = list(dict.fromkeys(text for name in ids if (text := name.strip())))
    if not found:
        raise UserError(f"{path}: holds no id; expected one a line")
    return found


def expect(where: str, value: Any, kind: type[Any] | tuple[type[Any], ...], words: str) -> Any:
    """The value, if it is of that kind; else a UserError that says in `words` what was expected."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: expected {words}, got {shown(value)}")
    return value


def member(where: str, entry: dict[str, Any], key: str, kind: type[Any] | tuple[type[Any], ...], words: str) -> Any:
    """`entry[key]`, if it is there and of that kind. Raises UserError."""
    if key not in entry:
        raise UserError(f"{where}: expected {key!r} ({words}), got only {', '.join(map(repr, entry)) or 'nothing'}")
    return expect(f"{where}: {key!r}", entry[key], kind, words)


def texts(where: str, value: Any) -> list[str]:
    """A list of texts. Raises UserError."""
    expect(where, value, list, "a list of texts")
    return [expect(f"{where}: caption {row}", text, str, "a text") for row, text in enumerate(value, start=1)]


def seconds(where: str, value: Any) -> float:
    """A number of seconds from 0 up, as a number or written out. Raises UserError."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < 1e9:
        raise UserError(f"{where}: expected a number of seconds from 0 up, got {shown(value)}")
    return number


def cut(where: str, start: Any, end: Any) -> tuple[float, float]:
    """Start and end of something that lasts. Raises UserError."""
    first, last = seconds(f"{where}: start", start), seconds(f"{where}: end", end)
    if first >= last:
        raise UserError(f"{where}: expected an end after the start, got {first:g} to {last:g} seconds")
    return first, last


def without_extension(name: str) -> tuple[str, str | None]:
    """`a.b.MP4` -> `a.b`, `mp4`; what is no video file's name stays, since ids have dots too."""
    found = _VIDEO_FILE.fullmatch(name)
    return (found[1], found[2].lower()) if found else (name, None)


def shown(value: Any) -> str:
    """The beginning of a value, for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
