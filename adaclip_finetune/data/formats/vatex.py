"""VATEX (Wang et al., ICCV 2019): [{videoID, enCap, chCap}] a split, or {id: [caption, …]} with lists of ids.

A video's id is `<YouTube id>_<start>_<end>` with six digits each, and its file is that clip: they become `duration`.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from adaclip_finetune.data.formats.clip import Clip, Source
from adaclip_finetune.data.formats.reading import add_split_flags, expect, member, needed_splits, read_ids, texts
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json

HELP = "VATEX: vatex_training_v1.0.json, vatex_validation_v1.0.json, …; or ref_captions.json and lists"

_CAPTIONS = {"en": "enCap", "zh": "chCap"}
_ID = re.compile(r"(.+)_(\d{6})_(\d{6})", re.ASCII)


def add_flags(parser: ArgumentParser) -> None:
    """The flags of `adaclip convert vatex`."""
    add_split_flags(parser, "list of {videoID, enCap, chCap}; with --data a list of ids, one a line")
    parser.add_argument("--data", metavar="FILE", type=Path, help="ref_captions.json: {id: [caption, …]}")
    parser.add_argument("--language", choices=tuple(_CAPTIONS), help="en: enCap (default), zh: chCap")


def read(arguments: Namespace) -> dict[str, Source]:
    """A split for each file. Raises UserError."""
    files = needed_splits(arguments)
    if arguments.data is None:
        key = _CAPTIONS[arguments.language or "en"]
        return {split: Source(_raw(path, key)) for split, path in files.items()}
    if arguments.language is not None:
        raise UserError(f"--language chooses among enCap and chCap; the captions of {arguments.data} are what they are")
    captions = expect(str(arguments.data), read_json(arguments.data), dict, "an object {id: [caption, …]}")
    return {split: _listed(read_ids(path), captions, arguments.data) for split, path in files.items()}


def _raw(path: Path, key: str) -> list[Clip]:
    clips: dict[str, Clip] = {}
    for row, entry in enumerate(expect(str(path), read_json(path), list, "a list of {videoID, enCap}"), start=1):
        where = f"{path}: entry {row}"
        expect(where, entry, dict, "an object {videoID, enCap, chCap}")
        video = member(where, entry, "videoID", str, "a text")
        if video in clips:
            raise UserError(f"{where}: the video {video!r} stands twice")
        clips[video] = _clip(where, video, entry.get(key, []))
    return list(clips.values())


def _listed(ids: list[str], captions: dict[str, Any], path: Path) -> Source:
    clips = [_clip(f"{path}: video {video!r}", video, captions[video]) for video in ids if video in captions]
    return Source(clips, absent=[video for video in ids if video not in captions])


def _clip(where: str, video: str, captions: Any) -> Clip:
    found = _ID.fullmatch(video)
    length = float(found[3]) - float(found[2]) if found else 0.0
    group = found[1] if found else None
    return Clip(where, video, texts(where, captions), duration=length if length > 0 else None, group=group)
