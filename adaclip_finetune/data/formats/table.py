"""Any table of videos and captions: CSV, TSV (.tsv, .txt) or JSONL, a caption a row."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adaclip_finetune.data.annotations import check_name
from adaclip_finetune.data.formats.clip import Clip, Source, merged
from adaclip_finetune.data.formats.reading import (
    add_split_flags,
    cut,
    expect,
    given_splits,
    member,
    read_csv,
    read_jsonl,
    shown,
    texts,
    without_extension,
)
from adaclip_finetune.errors import UserError

HELP = "any CSV, TSV or JSONL with a video and a caption a row"

_SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validate": "val", "validation": "val",
    "dev": "val", "test": "test", "testing": "test",
}  # fmt: skip


def add_flags(parser: ArgumentParser) -> None:
    """The flags of `adaclip convert table`."""
    parser.add_argument("--data", metavar="FILE", type=Path, help="one table of all splits, told apart by --split")
    add_split_flags(parser, "a table of its own (.csv; .tsv or .txt with tabs; .jsonl)")
    parser.add_argument(
        "--video-column", metavar="NAME", required=True, help="video ids, or file names; with folders if they have some"
    )
    parser.add_argument("--caption-column", metavar="NAME", required=True, help="captions; in JSONL also lists of them")
    parser.add_argument("--start", metavar="NAME", help="column of the second at which the clip begins in the video")
    parser.add_argument("--end", metavar="NAME", help="column of the second at which it ends")
    parser.add_argument("--split", metavar="NAME", help="column of train, val or test (validation, dev and so on too)")


def read(arguments: Namespace) -> dict[str, Source]:
    """A split for each file, or for each value of the column. Raises UserError."""
    files = given_splits(arguments)
    if (arguments.start is None) != (arguments.end is None):
        raise UserError("--start and --end belong together: give both columns or none")
    if (arguments.data is None) == (not files):
        raise UserError("give either --data FILE --split COLUMN, or at least one of --train, --val and --test FILE")
    if (arguments.data is None) != (arguments.split is None):
        raise UserError("--data and --split belong together: a table of one split is given as --train, --val or --test")
    if files:
        return {split: Source(merged(clip for clip, _ in _rows(path, arguments))) for split, path in files.items()}
    rows: dict[str, list[Clip]] = {}
    for clip, split in _rows(arguments.data, arguments):
        rows.setdefault(split, []).append(clip)
    return {split: Source(merged(clips)) for split, clips in rows.items()}


def _rows(path: Path, arguments: Namespace) -> Iterator[tuple[Clip, str]]:
    """A clip and its split ('' without such a column) a row."""
    names = [arguments.video_column, arguments.caption_column, arguments.start, arguments.end, arguments.split]
    columns = [name for name in names if name is not None]
    for line, values in _values(path, columns):
        where = f"{path}: line {line}"
        row = dict(zip(columns, values, strict=True))
        video, extension = without_extension(_text(where, row[arguments.video_column]).strip())
        check_name(where, video)
        caption = row[arguments.caption_column]
        clip = Clip(where, video, _captions(where, caption), extension=extension)
        if arguments.start is not None:
            clip.start, clip.end = cut(where, row[arguments.start], row[arguments.end])
            clip.video, clip.group = f"{video}_{clip.start:.10g}_{clip.end:.10g}", video
        yield clip, _split(where, row[arguments.split]) if arguments.split is not None else ""


def _values(path: Path, columns: list[str]) -> Iterator[tuple[int, list[Any]]]:
    kind = path.suffix.lower()
    if kind == ".jsonl":
        for line, entry in read_jsonl(path):
            where = f"{path}: line {line}"
            yield line, [member(where, entry, name, (str, int, float, list), "a text or number") for name in columns]
    elif kind in (".csv", ".tsv", ".txt"):
        yield from read_csv(path, columns, delimiter="," if kind == ".csv" else "\t")
    else:
        raise UserError(f"{path}: expected a file named .csv, .tsv, .txt or .jsonl, which tells how it is written")


def _text(where: str, value: Any) -> str:
    return str(expect(f"{where}: video", value, (str, int), "a text"))


def _captions(where: str, value: Any) -> list[str]:
    return texts(where, value) if isinstance(value, list) else [expect(f"{where}: caption", value, str, "a text")]


def _split(where: str, value: Any) -> str:
    if (split := _SPLITS.get(str(value).strip().lower())) is None:
        raise UserError(f"{where}: expected the split train, val or test, got {shown(value)}")
    return split
