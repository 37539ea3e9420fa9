"""Clips to train.json, val.json and test.json, all of them or none, with an account of each.

Everything goes through one clip at a time, so that ten million take no more memory than their number needs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from adaclip_finetune.data.annotations import check_name, is_unicode
from adaclip_finetune.data.formats.clip import SPLITS, Clip, Source
from adaclip_finetune.data.formats.overlap import Contents, shared_between
from adaclip_finetune.data.formats.present import Present
from adaclip_finetune.errors import UserError

_to_json = json.JSONEncoder(ensure_ascii=False).encode


@dataclass
class Counts:
    """What one split came to. `duplicates`: the same caption of the same video at the same time, dropped."""

    videos: int = 0
    captions: int = 0
    duplicates: int = 0
    without_captions: int = 0
    absent: int = 0
    files: int = 0


def write_splits(
    sources: Mapping[str, Source], output: Path, overwrite: bool = False, videos: Path | None = None
) -> list[str]:
    """Write a file for each split into the folder; returns the lines that tell of it.

    Raises UserError, and has then written nothing: a file is there without `overwrite`, or the source is wrong.
    """
    splits = [split for split in SPLITS if split in sources]
    for split in splits:
        target = output / f"{split}.json"
        if target.is_dir() or (not overwrite and os.path.lexists(target)):
            raise UserError(f"{target} is there already; choose another folder, or give --overwrite for a file")
    if videos is not None and not videos.is_dir():
        raise UserError(f"--videos {videos}: there is no such folder")
    present = Present(videos) if videos is not None else None
    counts: dict[str, Counts] = {}
    contents: dict[str, Contents] = {}
    with ExitStack() as stack:
        for split in splits:
            partial = _partial(output, split, stack)
            counts[split], contents[split] = _write(sources[split], partial, present)
        written = [split for split in splits if counts[split].videos]
        if not written:
            raise UserError(f"nothing to write: of {' and '.join(splits) or 'no split'} no video has a caption")
        overlaps = list(shared_between({split: contents[split] for split in written}))
        for split in written:
            contents[split].path.replace(output / f"{split}.json")
    lines = [*_table(counts, present)]
    lines += [_absent(split, sources[split].absent) for split in splits if sources[split].absent]
    if present and present.missing:
        lines += [f"no file for {present.missing:,} of them in {videos}, such as {', '.join(present.examples)}"]
    return [*lines, *overlaps, *(f"{output / f'{split}.json'}" for split in written)]


def _partial(output: Path, split: str, stack: ExitStack) -> Path:
    """Where a split is written until all are done; removed on leaving the stack if it is still there."""
    path = output / f".{split}.{os.getpid()}.partial"
    try:
        output.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(f"{output}: cannot be written to ({error.strerror})") from None
    stack.callback(path.unlink, missing_ok=True)
    return path


def _write(source: Source, path: Path, present: Present | None) -> tuple[Counts, Contents]:
    """The annotation file of one split, a video a line, and what was counted."""
    counts, contents = Counts(duplicates=source.duplicates), Contents(path)
    try:
        with path.open("w", encoding="utf-8") as file:
            for clip in source.clips:
                if _write_clip(clip, file, counts, contents) and present is not None:
                    counts.files += present.look(clip)
            file.write("\n}\n" if counts.videos else "{}\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    counts.absent = len(source.absent)
    return counts, contents


def _write_clip(clip: Clip, file: IO[str], counts: Counts, contents: Contents) -> bool:
    """Write the clip if it has a caption; whether it has."""
    check_name(clip.where, clip.video)
    kept = _kept(clip, counts)
    if not kept:
        counts.without_captions += 1
        return False
    entry: dict[str, Any] = {"sentences": [sentence for sentence, _ in kept]}
    if clip.timestamps is not None:
        entry["timestamps"] = [time for _, time in kept]
    for key in ("start", "end", "duration", "extension", "group"):
        if (value := getattr(clip, key)) is not None:
            entry[key] = value
    file.write(",\n" if counts.videos else "{\n")
    file.write(f"{_to_json(clip.video)}: {_to_json(entry)}")
    counts.videos += 1
    counts.captions += len(kept)
    contents.add(clip, entry["sentences"])
    return True


def _kept(clip: Clip, counts: Counts) -> list[tuple[str, tuple[float, float] | None]]:
    """Captions with their times, without the blank and the repeated. Counts them, blank ones only beside others."""
    times = clip.timestamps if clip.timestamps is not None else [None] * len(clip.sentences)
    if not all(map(is_unicode, (*clip.sentences, clip.group or ""))):
        raise UserError(f"{clip.where}: a caption or its source holds half a surrogate pair, which is no text")
    stripped = [(sentence.strip(), time) for sentence, time in zip(clip.sentences, times, strict=True)]
    told = [pair for pair in stripped if pair[0]]
    kept = told if clip.paragraph else list(dict.fromkeys(told))
    counts.duplicates += len(told) - len(kept)
    counts.without_captions += len(stripped) - len(told) if told else 0
    return kept


def _table(counts: Mapping[str, Counts], present: Present | None) -> Iterator[str]:
    titles = ["videos", "captions", "duplicates dropped", "without captions", "listed but absent"]
    yield "       " + "".join(f"{title:>20}" for title in [*titles, *(["files there"] if present else [])])
    for split, of in counts.items():
        values = [of.videos, of.captions, of.duplicates, of.without_captions, of.absent]
        yield f"{split:7}" + "".join(f"{value:>20,}" for value in [*values, *([of.files] if present else [])])


def _absent(split: str, ids: list[str]) -> str:
    return f"{split}: listed, but no captions are there for {', '.join(ids[:5])}{', …' if len(ids) > 5 else ''}"
