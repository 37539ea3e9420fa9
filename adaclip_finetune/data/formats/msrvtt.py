"""MSR-VTT (Xu et al., CVPR 2016), with the splits of its own file or of lists (1k-A: Yu et al., ECCV 2018).

Captions come as MSRVTT_data.json {videos, sentences}, or as MSR_VTT.json {annotations} of the Frozen-in-Time archive.
Its start and end are times in the source video, and the published files are the clips: so they become `duration`.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from adaclip_finetune.data.formats.clip import Clip, Source, merged
from adaclip_finetune.data.formats.reading import (
    add_split_flags,
    csv_lines,
    expect,
    given_splits,
    member,
    read_csv,
    read_ids,
    seconds,
)
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json

HELP = "MSR-VTT: MSRVTT_data.json or MSR_VTT.json, and lists such as MSRVTT_train.9k.csv and MSRVTT_JSFUSION_test.csv"

_SPLITS = {"train": "train", "validate": "val", "test": "test"}
_YOUTUBE = re.compile(r"(?:[?&]v=|youtu\.be/)([\w-]{11})")


def add_flags(parser: ArgumentParser) -> None:
    """The flags of `adaclip convert msrvtt`."""
    parser.add_argument("--data", metavar="FILE", type=Path, help="MSRVTT_data.json or MSR_VTT.json: the captions")
    add_split_flags(
        parser,
        "list of the video ids (csv with a column video_id, or one a line; a column sentence is used as the captions)",
    )


def read(arguments: Namespace) -> dict[str, Source]:
    """The splits of the lists, or without lists those of the file itself. Raises UserError."""
    lists = given_splits(arguments)
    if arguments.data is None and not lists:
        raise UserError("nothing to convert: give --data MSRVTT_data.json, or --test MSRVTT_JSFUSION_test.csv")
    captions, facts = _read_data(arguments.data) if arguments.data else ({}, {})
    if lists:
        return {split: _listed(path, captions, facts, arguments.data) for split, path in lists.items()}
    return {split: Source(clips) for split, clips in _own_splits(arguments.data, captions, facts).items()}


def _own_splits(path: Path, captions: dict[str, list[str]], facts: dict[str, dict[str, Any]]) -> dict[str, list[Clip]]:
    splits: dict[str, list[Clip]] = {}
    for video, fact in facts.items():
        if (split := _SPLITS.get(fact.get("split", ""))) is None:
            raise UserError(
                f"{path}: video {video!r}: expected a split (train, validate, test); without it the lists "
                "say which videos are meant (--train FILE --test FILE)"
            )
        clip = Clip(f"{path}: video {video!r}", video, captions[video], **_without_split(fact))
        splits.setdefault(split, []).append(clip)
    return splits


def _listed(path: Path, captions: dict[str, list[str]], facts: dict[str, dict[str, Any]], data: Path | None) -> Source:
    _, header = next(csv_lines(path), (0, []))
    if "sentence" in header:
        rows = read_csv(path, ["video_id", "sentence"])
        clips = [
            Clip(f"{path}: line {line}", video, [sentence], **_without_split(facts.get(video, {})))
            for line, (video, sentence) in rows
        ]
        return Source(merged(clips))
    if data is None:
        raise UserError(f"{path}: has no column sentence: the captions come from --data MSRVTT_data.json")
    ids = read_ids(path)
    clips = [
        Clip(f"{data}: video {video!r}", video, captions[video], **_without_split(facts[video]))
        for video in ids
        if video in captions
    ]
    return Source(clips, absent=[video for video in ids if video not in captions])


def _without_split(fact: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fact.items() if key != "split"}


def _read_data(path: Path) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
    """Captions by video, and what else is known: split, group, duration."""
    content = expect(str(path), read_json(path), dict, "an object {videos, sentences} or {annotations}")
    key, id_key = ("sentences", "video_id") if "sentences" in content else ("annotations", "image_id")
    rows = member(str(path), content, key, list, f"a list of {{{id_key}, caption}}")
    facts: dict[str, dict[str, Any]] = {}
    if key == "sentences":
        for row, entry in enumerate(member(str(path), content, "videos", list, "a list of videos"), start=1):
            video, fact = _fact(f"{path}: videos, entry {row}", entry)
            facts[video] = fact
    captions: dict[str, list[str]] = {video: [] for video in facts}
    for row, entry in enumerate(rows, start=1):
        where = f"{path}: {key}, entry {row}"
        expect(where, entry, dict, f"an object {{{id_key}, caption}}")
        video = member(where, entry, id_key, str, "a text")
        captions.setdefault(video, []).append(member(where, entry, "caption", str, "a text"))
    return captions, {video: facts.get(video, {}) for video in captions}


def _fact(where: str, entry: Any) -> tuple[str, dict[str, Any]]:
    expect(where, entry, dict, "an object {video_id, url, 'start time', 'end time', split}")
    fact: dict[str, Any] = {"split": str(entry.get("split", ""))}
    if isinstance(url := entry.get("url"), str) and url.strip():
        found = _YOUTUBE.search(url)
        fact["group"] = found[1] if found else url
    if "start time" in entry and "end time" in entry:
        start, end = (seconds(f"{where}: {key!r}", entry[key]) for key in ("start time", "end time"))
        if end > start:
            fact["duration"] = round(end - start, 3)
    return member(where, entry, "video_id", str, "a text"), fact
