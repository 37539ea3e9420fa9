"""Write clips as train.json, val.json and test.json, all of them or none, and count what is written.

Clips are written one at a time, so that ten million of them need no more memory than their number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from adaclip_finetune.data.annotations import check_name, is_blank, is_unicode
from adaclip_finetune.data.formats.clips import SPLITS, SourceClip, SourceSplit
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.errors import UserError

_to_json = json.JSONEncoder(ensure_ascii=False).encode


@dataclass
class SplitCounts:
    """What was counted in a split. `duplicates` are captions of the same video at the same time, which are dropped."""

    videos: int = 0
    captions: int = 0
    duplicates: int = 0
    without_captions: int = 0
    absent: int = 0
    files: int = 0


class _FileCounter:
    """Looks for files of clips as training does, and notes the first few that are missing."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"--videos {folder}: there is no such folder")
        self.folder = folder
        self.missing: list[str] = []
        self._store = VideoFolder(folder)

    def has(self, clip: SourceClip) -> bool:
        """Return whether the clip, or the file from which it is cut, is there."""
        names = [clip.video] if clip.start is None or clip.group is None else [clip.video, clip.group]
        for name in names:
            self._store.extensions = {name: clip.extension} if clip.extension else {}
            try:
                self._store.find(name)
            except FrameError:
                continue
            return True
        self.missing.append(f"{names[-1]}.{clip.extension}" if clip.extension else names[-1])
        return False


def write_splits(
    sources: Mapping[str, SourceSplit], output: Path, overwrite: bool = False, videos: Path | None = None
) -> list[str]:
    """Write a file for each split into the folder, and return the lines that tell what was written.

    Raises UserError, and has then written nothing, if a file is there without `overwrite`, or the source is wrong.
    """
    splits = [split for split in SPLITS if split in sources]
    for split in splits:
        target = output / f"{split}.json"
        if target.is_dir() or (not overwrite and os.path.lexists(target)):
            raise UserError(f"{target} is there already; choose another folder, or give --overwrite for a file")
    files = _FileCounter(videos) if videos is not None else None
    counts: dict[str, SplitCounts] = {}
    with ExitStack() as stack:
        partial = {split: _partial(output, split, stack) for split in splits}
        for split in splits:
            counts[split] = _write(sources[split], partial[split], files)
        written = [split for split in splits if counts[split].videos]
        if not written:
            raise UserError(f"nothing to write: of {' and '.join(splits) or 'no split'} no video has a caption")
        for split in written:
            partial[split].replace(output / f"{split}.json")
    lines = [*_table(counts, files is not None)]
    for split in splits:
        if ids := sources[split].absent:
            lines.append(f"{split}: listed, but without captions: {', '.join(ids[:5])}{', …' if len(ids) > 5 else ''}")
    if files and files.missing:
        lines.append(f"no file for {len(files.missing):,} of them in {videos}, such as {', '.join(files.missing[:3])}")
    return [*lines, *(f"{output / f'{split}.json'}" for split in written)]


def _partial(output: Path, split: str, stack: ExitStack) -> Path:
    """Return the file in which a split is written until all are done; the stack removes it if it is left."""
    path = output / f".{split}.{os.getpid()}.partial"
    try:
        output.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(f"{output}: cannot be written to ({error.strerror})") from None
    stack.callback(path.unlink, missing_ok=True)
    return path


def _write(source: SourceSplit, path: Path, files: _FileCounter | None) -> SplitCounts:
    """Write the annotation file of a split, a video in each line, and return what was counted."""
    counts = SplitCounts(duplicates=source.duplicates)
    try:
        with path.open("w", encoding="utf-8") as file:
            for clip in source.clips:
                if _write_clip(clip, file, counts) and files is not None:
                    counts.files += files.has(clip)
            file.write("\n}\n" if counts.videos else "{}\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    counts.absent = len(source.absent)
    return counts


def _write_clip(clip: SourceClip, file: IO[str], counts: SplitCounts) -> bool:
    """Write a clip if it has a caption; return whether it has."""
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
    return True


def _kept(clip: SourceClip, counts: SplitCounts) -> list[tuple[str, tuple[float, float] | None]]:
    """Return the captions with their times, without blank and repeated ones, and count what is left out.

    A blank caption is counted if others of its video are left.
    """
    times = clip.timestamps if clip.timestamps is not None else [None] * len(clip.sentences)
    if not all(map(is_unicode, (*clip.sentences, clip.group or ""))):
        raise UserError(f"{clip.where}: a caption or its source holds half a surrogate pair, which is no text")
    pairs = [(text.strip(), time) for text, time in zip(clip.sentences, times, strict=True) if not is_blank(text)]
    kept = pairs if clip.paragraph else list(dict.fromkeys(pairs))
    counts.duplicates += len(pairs) - len(kept)
    counts.without_captions += len(clip.sentences) - len(pairs) if pairs else 0
    return kept


def _table(counts: Mapping[str, SplitCounts], with_files: bool) -> Iterator[str]:
    titles = ["videos", "captions", "duplicates dropped", "without captions", "listed but absent", "files there"]
    shown = len(titles) if with_files else len(titles) - 1
    yield "       " + "".join(f"{title:>20}" for title in titles[:shown])
    for split, of in counts.items():
        values = [of.videos, of.captions, of.duplicates, of.without_captions, of.absent, of.files]
        yield f"{split:7}" + "".join(f"{value:>20,}" for value in values[:shown])
