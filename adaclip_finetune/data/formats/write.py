"""Write clips as train.json, val.json and test.json, all of them or none, and count what is written.

Clips are written one at a time, so that ten million of them need no more memory than their number.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adaclip_finetune.data.annotations import check_name, is_blank, is_unicode
from adaclip_finetune.data.formats.published import SPLITS, SourceClip, SourceSplit
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.errors import UserError

TITLES = ("videos", "captions", "duplicates dropped", "without captions", "listed but absent", "files there")

_to_json = json.JSONEncoder(ensure_ascii=False).encode


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
    if videos is not None and not videos.is_dir():
        raise UserError(f"--videos {videos}: there is no such folder")
    store = VideoFolder(videos) if videos is not None else None
    missing: list[str] = []
    counts: dict[str, Counter[str]] = {}
    try:
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=output, prefix=".convert.") as folder:
            for split in splits:
                counts[split] = _write(sources[split], Path(folder, split), store, missing)
            written = [split for split in splits if counts[split]["videos"]]
            if not written:
                raise UserError(f"nothing to write: of {' and '.join(splits) or 'no split'} no video has a caption")
            for split in written:
                Path(folder, split).replace(output / f"{split}.json")
    except OSError as error:
        raise UserError(f"{output}: cannot be written to ({error.strerror})") from None
    titles = TITLES if store is not None else TITLES[:-1]
    lines = ["       " + "".join(f"{title:>20}" for title in titles)]
    lines += [f"{split:7}" + "".join(f"{of[title]:>20,}" for title in titles) for split, of in counts.items()]
    for split in splits:
        if ids := sources[split].absent:
            lines.append(f"{split}: listed, but without captions: {', '.join(ids[:5])}{', …' if len(ids) > 5 else ''}")
    if missing:
        lines.append(f"no file for {len(missing):,} of them in {videos}, such as {', '.join(missing[:3])}")
    return [*lines, *(f"{output / f'{split}.json'}" for split in written)]


def _write(source: SourceSplit, path: Path, store: VideoFolder | None, missing: list[str]) -> Counter[str]:
    """Write the annotation file of a split, a video in each line, and return what was counted.

    The names of videos that have no file in `store` are added to `missing`.
    """
    counts = Counter({"duplicates dropped": source.duplicates})
    with path.open("w", encoding="utf-8") as file:
        for clip in source.clips:
            check_name(clip.where, clip.video)
            if (entry := _entry(clip, counts)) is None:
                continue
            file.write(",\n" if counts["videos"] else "{\n")
            file.write(f"{_to_json(clip.video)}: {_to_json(entry)}")
            counts["videos"] += 1
            counts["captions"] += len(entry["sentences"])
            if store is not None:
                name = _missing_file(store, clip)
                counts["files there"] += name is None
                missing += [] if name is None else [name]
        file.write("\n}\n" if counts["videos"] else "{}\n")
    counts["listed but absent"] = len(source.absent)  # known when all clips are read
    return counts


def _entry(clip: SourceClip, counts: Counter[str]) -> dict[str, Any] | None:
    """Return a clip as an annotation has it, without blank and repeated captions; None if no caption is left.

    What is left out is counted: a blank caption only if its video has others.
    """
    times = clip.timestamps if clip.timestamps is not None else [None] * len(clip.sentences)
    if not all(map(is_unicode, (*clip.sentences, clip.group or ""))):
        raise UserError(f"{clip.where}: a caption or its source holds half a surrogate pair, which is no text")
    pairs = [(text.strip(), time) for text, time in zip(clip.sentences, times, strict=True) if not is_blank(text)]
    counts["without captions"] += len(clip.sentences) - len(pairs) if pairs else 1
    if not pairs:
        return None
    kept = pairs if clip.paragraph else list(dict.fromkeys(pairs))
    counts["duplicates dropped"] += len(pairs) - len(kept)
    entry: dict[str, Any] = {"sentences": [text for text, _ in kept]}
    if clip.timestamps is not None:
        entry["timestamps"] = [time for _, time in kept]
    facts = {key: getattr(clip, key) for key in ("start", "end", "duration", "extension", "group")}
    return entry | {key: value for key, value in facts.items() if value is not None}


def _missing_file(store: VideoFolder, clip: SourceClip) -> str | None:
    """Return the name of the file of a clip, None if training finds it or the file from which the clip is cut."""
    names = [clip.video] if clip.start is None or clip.group is None else [clip.video, clip.group]
    for name in names:
        store.extensions = {name: clip.extension} if clip.extension else {}
        with suppress(FrameError):
            store.find(name)
            return None
    return f"{names[-1]}.{clip.extension}" if clip.extension else names[-1]
