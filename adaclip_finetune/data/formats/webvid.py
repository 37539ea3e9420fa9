"""WebVid (Bain et al., ICCV 2021): csv `videoid,name,page_idx,page_dir,duration,contentUrl`, up to ten million rows.

The file is gone through twice. The first time finds the ids that may stand twice, by 8 bytes a row; the second passes
on a row at a time and keeps only those few. So no more than the hashes are ever in memory.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from array import array
from collections.abc import Iterator
from pathlib import Path

from adaclip_finetune.data.formats.clip import Clip, Source, merged
from adaclip_finetune.data.formats.reading import add_split_flags, needed_splits, read_csv, shown
from adaclip_finetune.errors import UserError

HELP = "WebVid: results_2M_train.csv or results_10M_train.csv, results_2M_val.csv"

_DURATION = re.compile(r"P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?)?", re.ASCII)


def add_flags(parser: ArgumentParser) -> None:
    """The flags of `adaclip convert webvid`."""
    add_split_flags(parser, "csv with the columns videoid and name; duration and page_dir are used if they are there")
    parser.add_argument(
        "--nested", action="store_true", help="names as downloads lay them out: <page_dir>/<videoid>, not <videoid>"
    )


def read(arguments: Namespace) -> dict[str, Source]:
    """A split for each file, read as it is written. Raises UserError, as does reading on."""
    return {split: Source(_clips(path, arguments.nested)) for split, path in needed_splits(arguments).items()}


def _clips(path: Path, nested: bool) -> Iterator[Clip]:
    """Each video once: those whose ids repeat come last."""
    repeated = _repeated(array("q", (hash(clip.video) for clip in _rows(path, nested))))
    later = []
    for clip in _rows(path, nested):
        if hash(clip.video) in repeated:
            later.append(clip)
        else:
            yield clip
    yield from merged(later)


def _repeated(numbers: array[int]) -> set[int]:
    import numpy as np

    if not numbers:
        return set()
    ordered = np.frombuffer(numbers, np.int64)
    ordered.sort()
    return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


def _rows(path: Path, nested: bool) -> Iterator[Clip]:
    columns = ["videoid", "name", *(["page_dir"] if nested else [])]
    for line, (video, caption, *page, duration) in read_csv(path, columns, ["duration"]):
        where = f"{path}: line {line}"
        yield Clip(where, "/".join([*page, video]), [caption], duration=_seconds(where, duration))


def _seconds(where: str, text: str) -> float | None:
    """PT00H00M15S -> 15.0"""
    if not text:
        return None
    found = _DURATION.fullmatch(text)
    if found is None or not any(found.groups()):
        raise UserError(f"{where}: expected a duration such as PT00H00M15S, got {shown(text)}")
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
