"""Merging the parts of an index, which shards embedded, into the index that one process would have written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adaclip_finetune.durable import flush_folder, write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.build import check_same, replace_index, writing
from adaclip_finetune.search.index import THUMBS
from adaclip_finetune.search.stored import FILE, EmbeddedVideo, IndexInfo, StoredIndex, read_index
from adaclip_finetune.search.transcripts import merge_transcripts

_WHAT = {  # of `IndexInfo`, in words
    "fingerprint": "another model",
    "run": "a model at another place",
    "settings": "other settings",
    "source": "another folder or annotation",
    "moments": "other --moments",
    "untrained": "another model",
    "shard": "another number of shards, or while other videos, or newer ones, were there",
}


def merge_parts(paths: Sequence[Path], folder: Path) -> int:
    """Write the index of all videos of the parts into `folder`, and return how many there are.

    Its bytes are those of the index that one process makes of the same videos. An index of the same model and videos
    that is there is replaced. Raise UserError if parts are missing, given twice, or do not belong together.
    """
    if folder.resolve() in [path.resolve() for path in paths]:
        raise UserError(f"-o {folder}: is one of the parts; give another name")
    parts = {path: read_index(path) for path in paths}
    info = _common_info(parts)
    placed: list[tuple[int, Path, EmbeddedVideo]] = []
    for path, part in parts.items():
        assert part.positions is not None, "a part of a shard has positions"
        placed += ((place, path, video) for place, video in zip(part.positions.tolist(), part.videos(), strict=True))
    if not placed:
        raise UserError(f"{paths[0]} and the other parts hold no video")
    placed.sort(key=lambda one: one[0])
    first = next(iter(parts.values())).vectors
    with writing(folder, {"merged": asdict(info)}) as finished:
        if (folder / FILE).exists():
            check_same(folder, read_index(folder).info, info, sync=True)
        finished.open()
        (folder / THUMBS).mkdir(exist_ok=True)
        for _, path, video in placed:
            for name in video.thumbs():
                _copy(path / THUMBS / name, folder / THUMBS / name)
        flush_folder(folder / THUMBS)
        replace_index(folder, info, [video for _, _, video in placed], first.shape[1], first.dtype)
        merge_transcripts(paths, folder)
    return len(placed)


def _common_info(parts: Mapping[Path, StoredIndex]) -> IndexInfo:
    """Return what the whole index is made with. Raise UserError if the parts are not those of one whole."""
    (first, one), *others = parts.items()
    numbers: dict[int, Path] = {}
    for path, part in parts.items():
        shard = part.info.shard
        if shard is None:
            raise UserError(f"{path}: is a whole index, not a part that `adaclip index --shard` wrote")
        if (known := numbers.setdefault(shard["number"], path)) != path:
            raise UserError(f"{path}: is shard {shard['number']} of {shard['of']}, as {known} is; give each part once")
    for path, part in others:
        for name, what in _WHAT.items():
            if _comparable(part.info)[name] != _comparable(one.info)[name]:
                way_out = "run `adaclip index --shard` again for all shards; videos that have not changed are kept"
                raise UserError(f"{path}: was made with {what} than {first}; {way_out}")
        if part.vectors.dtype != one.vectors.dtype:
            raise UserError(f"{path}: has vectors of {part.vectors.dtype}, {first} of {one.vectors.dtype}")
    assert one.info.shard is not None
    of = one.info.shard["of"]
    if missing := [number for number in range(1, of + 1) if number not in numbers]:
        shown = ", ".join(f"{number}/{of}" for number in missing[:20]) + (" …" if len(missing) > 20 else "")
        raise UserError(f"{len(missing)} of {of} parts are missing: {shown}")
    return replace(one.info, shard=None)


def _comparable(info: IndexInfo) -> dict[str, Any]:
    facts = asdict(info)
    return facts | {"shard": {**facts["shard"], "number": None}}


def _copy(source: Path, target: Path) -> None:
    """Link `target` to the file `source`, which is never changed in place, or copy it from another disk."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except FileNotFoundError as error:
        raise UserError(f"{source}: is missing; run `adaclip index --shard` again for this part") from error
    except OSError:
        write_durably(target, source.read_bytes())
