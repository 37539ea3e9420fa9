"""DiDeMo (Hendricks et al., ICCV 2017): [{annotation_id, video, description, times}], times in segments of 5 seconds.

As retrieval uses it, a video is one paragraph: its descriptions in the order of the file, each ending in a full stop.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path
from typing import Any

from adaclip_finetune.data.formats.clip import SPLITS, Clip, Source, merged
from adaclip_finetune.data.formats.reading import (
    add_split_flags,
    expect,
    given_splits,
    member,
    needed_splits,
    read_ids,
    shown,
    without_extension,
)
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json

HELP = "DiDeMo: train_data.json, val_data.json, test_data.json, and lists of videos"

SEGMENT_SECONDS = 5.0


def add_flags(parser: ArgumentParser) -> None:
    """The flags of `adaclip convert didemo`."""
    add_split_flags(parser, "train_data.json, val_data.json or test_data.json")
    for split in SPLITS:
        parser.add_argument(
            f"--{split}-ids",
            metavar="FILE",
            type=Path,
            help=f"only these of {split}: list of videos, whose extensions count if they have some",
        )


def read(arguments: Namespace) -> dict[str, Source]:
    """A split for each file. Raises UserError."""
    files, lists = needed_splits(arguments), given_splits(arguments, "_ids")
    if lost := sorted(lists.keys() - files.keys()):
        raise UserError(f"--{lost[0]}-ids needs the descriptions too: --{lost[0]} FILE")
    return {split: _split(path, lists.get(split)) for split, path in files.items()}


def _split(path: Path, ids: Path | None) -> Source:
    entries = expect(str(path), read_json(path), list, "a list of {annotation_id, video, description, times}")
    rows: dict[Any, Clip] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: entry {number}"
        expect(where, entry, dict, "an object {annotation_id, video, description, times}")
        rows.setdefault(member(where, entry, "annotation_id", (int, str), "a number or text"), _clip(where, entry))
    source = Source(merged(rows.values()), duplicates=len(entries) - len(rows))
    return source if ids is None else _listed(source, read_ids(ids))


def _clip(where: str, entry: dict[str, Any]) -> Clip:
    video, extension = without_extension(member(where, entry, "video", str, "a text"))
    description = member(where, entry, "description", str, "a text").strip()
    if description and not description.endswith("."):
        description += "."
    times = member(where, entry, "times", list, "a list of [first, last] segment")
    return Clip(where, video, [description], [_seconds(where, times)], extension=extension, paragraph=True)


def _seconds(where: str, times: list[Any]) -> tuple[float, float]:
    """The seconds that most annotators chose, the earlier answer at a tie."""
    for pair in times:
        good = isinstance(pair, list) and len(pair) == 2 and all(type(segment) is int for segment in pair)
        if not good or not 0 <= pair[0] <= pair[1]:
            raise UserError(f"{where}: 'times': expected [first, last] segment, counted from 0, got {shown(pair)}")
    if not times:
        raise UserError(f"{where}: 'times': expected at least one [first, last] segment")
    [((first, last), _)] = Counter(map(tuple, times)).most_common(1)
    return first * SEGMENT_SECONDS, (last + 1) * SEGMENT_SECONDS


def _listed(source: Source, names: list[str]) -> Source:
    """What the list names, in the order of the annotation.

    A downloaded file may have another extension than the annotation says (`a.mp4`), or a second one (`a.mov.mp4`).
    """
    known = {clip.video: clip for clip in source.clips}
    chosen: set[str] = set()
    absent: list[str] = []
    for name in names:
        stem, extension = without_extension(name)
        inner, _ = without_extension(stem)
        clip = known.get(stem) or known.get(inner)
        if clip is None:
            absent.append(name)
            continue
        chosen.add(clip.video)
        if extension is not None:
            clip.extension = extension
    return Source([clip for clip in known.values() if clip.video in chosen], absent, source.duplicates)
