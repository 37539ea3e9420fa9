"""YouCook2 (Zhou et al., AAAI 2018): {"database": {id: {subset, recipe_type, annotations: [{id, segment, sentence}]}}}.

Each annotated segment is a clip of its own: `training/101/<id>_<n>`, cut out of the file `training/101/<id>`.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adaclip_finetune.data.formats.clip import Clip, Source
from adaclip_finetune.data.formats.reading import cut, expect, member
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json

HELP = "YouCook2: youcookii_annotations_trainval.json"

_SPLITS = {"training": "train", "validation": "val", "testing": "test"}


def add_flags(parser: ArgumentParser) -> None:
    """The flags of `adaclip convert youcook2`."""
    parser.add_argument(
        "--data", metavar="FILE", type=Path, required=True, help="youcookii_annotations_trainval.json: all splits"
    )


def read(arguments: Namespace) -> dict[str, Source]:
    """The splits that the file tells apart. Raises UserError."""
    path = arguments.data
    content = expect(str(path), read_json(path), dict, "an object {database}")
    rows: dict[str, list[Clip]] = {}
    for video, entry in member(str(path), content, "database", dict, "an object {id: {subset, …}}").items():
        where = f"{path}: video {video!r}"
        expect(where, entry, dict, "an object {subset, recipe_type, annotations}")
        subset = member(where, entry, "subset", str, "training, validation or testing")
        if subset not in _SPLITS:
            raise UserError(f"{where}: 'subset': expected {', '.join(_SPLITS)}, got {subset!r}")
        recipe = member(where, entry, "recipe_type", (str, int), "a text")
        rows.setdefault(_SPLITS[subset], []).extend(_clips(where, f"{subset}/{recipe}/{video}", entry))
    return {split: Source(clips) for split, clips in rows.items()}


def _clips(where: str, file: str, entry: dict[str, Any]) -> Iterator[Clip]:
    seen = set()
    parts = expect(f"{where}: 'annotations'", entry.get("annotations", []), list, "a list of {id, segment, sentence}")
    for row, part in enumerate(parts, start=1):
        here = f"{where}: annotation {row}"
        expect(here, part, dict, "an object {id, segment, sentence}")
        number = member(here, part, "id", (int, str), "a number")
        if number in seen:
            raise UserError(f"{here}: the id {number} stands twice")
        seen.add(number)
        segment = member(here, part, "segment", list, "[start, end] in seconds")
        if len(segment) != 2:
            raise UserError(f"{here}: 'segment': expected [start, end] in seconds, got {segment!r}")
        start, end = cut(f"{here}: 'segment'", *segment)
        sentence = member(here, part, "sentence", str, "a text")
        yield Clip(here, f"{file}_{number}", [sentence], start=start, end=end, group=file)
