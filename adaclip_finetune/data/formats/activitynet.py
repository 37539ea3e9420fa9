"""ActivityNet Captions (Krishna et al., ICCV 2017): {"v_<id>": {duration, timestamps, sentences}}, a paragraph each."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from adaclip_finetune.data.formats.clip import SPLITS, Clip, Source
from adaclip_finetune.data.formats.reading import (
    add_split_flags,
    expect,
    given_splits,
    member,
    needed_splits,
    read_ids,
    seconds,
    texts,
)
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json

HELP = "ActivityNet Captions: train.json, val_1.json, val_2.json, and lists of ids"


def add_flags(parser: ArgumentParser) -> None:
    """The flags of `adaclip convert activitynet`."""
    add_split_flags(parser, "train.json, val_1.json or val_2.json")
    for split in SPLITS:
        parser.add_argument(
            f"--{split}-ids",
            metavar="FILE",
            type=Path,
            help=f"only these of {split}: list of ids, with or without v_ in front",
        )


def read(arguments: Namespace) -> dict[str, Source]:
    """A split for each file. Raises UserError."""
    files, lists = needed_splits(arguments), given_splits(arguments, "_ids")
    if lost := sorted(lists.keys() - files.keys()):
        raise UserError(f"--{lost[0]}-ids needs the captions too: --{lost[0]} FILE")
    return {split: _split(path, lists.get(split)) for split, path in files.items()}


def _split(path: Path, ids: Path | None) -> Source:
    content = expect(str(path), read_json(path), dict, "an object {v_<id>: {duration, timestamps, sentences}}")
    if ids is None:
        return Source([_clip(path, video, entry) for video, entry in content.items()])
    listed = {video: _named_in(content, video) for video in read_ids(ids)}
    chosen = set(listed.values())
    return Source(
        [_clip(path, video, entry) for video, entry in content.items() if video in chosen],
        absent=[video for video, found in listed.items() if found is None],
    )


def _named_in(content: dict[str, Any], video: str) -> str | None:
    """The key that is meant. As it stands first: a YouTube id may begin with v_ itself."""
    names = (video, f"v_{video}", video.removeprefix("v_"))
    return next((name for name in names if name in content), None)


def _clip(path: Path, video: str, entry: Any) -> Clip:
    where = f"{path}: video {video!r}"
    expect(where, entry, dict, "an object {duration, timestamps, sentences}")
    sentences = texts(where, member(where, entry, "sentences", list, "a list of texts"))
    timestamps = None
    if "timestamps" in entry:
        pairs = member(where, entry, "timestamps", list, "a list of [start, end]")
        if len(pairs) != len(sentences):
            raise UserError(f"{where}: expected a timestamp a sentence, got {len(pairs)} for {len(sentences)}")
        timestamps = [_times(f"{where}: timestamp {row}", pair) for row, pair in enumerate(pairs, start=1)]
    duration = seconds(f"{where}: 'duration'", entry["duration"]) if "duration" in entry else None
    return Clip(where, video, sentences, timestamps, duration=duration, paragraph=True)


def _times(where: str, pair: Any) -> tuple[float, float]:
    if not isinstance(pair, list) or len(pair) != 2:
        raise UserError(f"{where}: expected [start, end] in seconds, got {pair!r}")
    return seconds(where, pair[0]), seconds(where, pair[1])
