"""LSMDC (Rohrbach et al., IJCV 2017): tab-separated, no header, six columns a row, ids that repeat.

The columns: clip_id, start_aligned, end_aligned, start_extracted, end_extracted, sentence. The times are those of the
movie, and the published files are the clips: so what lies between the extracted ones becomes `duration`.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from adaclip_finetune.data.formats.clip import Clip, Source, merged
from adaclip_finetune.data.formats.reading import add_split_flags, csv_lines, needed_splits, shown
from adaclip_finetune.errors import UserError

HELP = "LSMDC: LSMDC16_annos_training.csv, LSMDC16_annos_val.csv, LSMDC16_challenge_1000_publictest.csv"

COLUMNS = ("clip_id", "start_aligned", "end_aligned", "start_extracted", "end_extracted", "sentence")

_TIME = re.compile(r"(\d+)[.:](\d+)[.:](\d+)[.,:](\d{1,3})", re.ASCII)
_TIMES_IN_ID = re.compile(r"_\d+\.\d+\.\d+\.\d+-\d+\.\d+\.\d+\.\d+$", re.ASCII)


def add_flags(parser: ArgumentParser) -> None:
    """The flags of `adaclip convert lsmdc`."""
    add_split_flags(parser, "six columns with tabs between them, the last one the sentence")
    parser.add_argument(
        "--nested", action="store_true", help="names as the archive has its files: <movie>/<clip_id>, not <clip_id>"
    )


def read(arguments: Namespace) -> dict[str, Source]:
    """A split for each file. Raises UserError."""
    return {split: Source(merged(_rows(path, arguments.nested))) for split, path in needed_splits(arguments).items()}


def _rows(path: Path, nested: bool) -> Iterator[Clip]:
    for line, row in csv_lines(path, "\t", quoted=False):
        where = f"{path}: line {line}"
        if not row:
            continue
        if len(row) != len(COLUMNS):
            raise UserError(
                f"{where}: expected {len(COLUMNS)} columns with tabs between them ({', '.join(COLUMNS)}), "
                f"got {len(row)}: {shown(row)}"
            )
        name, start, end, sentence = row[0].strip(), row[3], row[4], row[5]
        movie = _TIMES_IN_ID.sub("", name)
        length = _seconds(where, end) - _seconds(where, start)
        duration = round(length, 3) if length > 0 else None
        yield Clip(where, f"{movie}/{name}" if nested else name, [sentence], duration=duration, group=movie)


def _seconds(where: str, text: str) -> float:
    if (found := _TIME.fullmatch(text.strip())) is None:
        raise UserError(f"{where}: expected a time such as 00.01.59.370, got {shown(text)}")
    hours, minutes, seconds, fraction = found.groups()
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction}")
