"""`adaclip index`: embed the videos that are new or changed, keep the others, and write the index of all."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.readable import find_unreadable, listing
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import FolderLock
from adaclip_finetune.search import nearest
from adaclip_finetune.search.about import About
from adaclip_finetune.search.embed import Video, embed_clips
from adaclip_finetune.search.parts import Parts
from adaclip_finetune.search.recall import recall_of
from adaclip_finetune.search.retriever import Retriever
from adaclip_finetune.search.stored import (
    MARK,
    THUMBS,
    StoredIndex,
    finish_move,
    is_index,
    read_index,
    write_index,
)
from adaclip_finetune.search.thumbnails import remove_others
from adaclip_finetune.search.videos import Clip, Source

# What an index does not ask for again where it is searched.
_OF_THE_MACHINE = frozenset({"device", "xpu", "precision", "tf32", "num_workers", "pin_mem", "val_batch_size"})


@dataclass(frozen=True)
class Request:
    """What is asked of an index. Kind and dtype None: as it is, or else flat and float32. `settings`: what the model's
    run does not tell, or others than it tells."""

    kind: str | None = None
    dtype: str | None = None
    sync: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Indexed:
    """What was done: how many videos were `embedded`, and checked before, in how many `seconds`; how many were `kept`;
    which are `broken` (id → reason) or `vanished` (and dropped, if that was asked); and what is in the index now."""

    embedded: int
    seconds: float
    kept: int
    broken: dict[str, str]
    vanished: list[str]
    count: int
    about: About
    recall: float | None  # of the 10 nearest; None: exact, or not to be measured
    asked: str  # what recall was measured with


def index_videos(model: Retriever, source: Source, folder: Path, request: Request) -> Indexed:
    """Raises UserError; what was embedded until then is kept, and the same call goes on from there."""
    model.refuse_query_dependent()
    _make_ours(folder)
    lock = FolderLock(folder)
    lock.take()
    try:
        finish_move(folder)
        (folder / THUMBS).mkdir(exist_ok=True)
        return _Indexing(model, source, folder, request).run()
    except OSError as error:
        raise UserError(f"{folder}: {error}. What is finished is kept; the same command goes on") from error
    finally:
        lock.release()


def _make_ours(folder: Path) -> None:
    """Everything in an index's folder may be replaced or removed: it must be one, or hold nothing. Raises UserError."""
    try:
        folder.mkdir(exist_ok=True)
        if not (is_index(folder) or (folder / MARK).exists()):
            if any(not path.name.startswith((".lock-", "lock.json")) for path in folder.iterdir()):
                raise UserError(f"-o {folder}: holds other things and is no index; give the name of a new folder")
            (folder / MARK).touch()
    except OSError as error:
        raise UserError(f"-o {folder}: cannot be made ({error.strerror})") from error


class _Row(NamedTuple):
    video: Video
    vector: NDArray[Any]  # (D,)


class _Indexing:
    """One run of the command, its folder being locked."""

    def __init__(self, model: Retriever, source: Source, folder: Path, request: Request) -> None:
        self.model, self.source, self.folder, self.request = model, source, folder, request
        self.clips = {clip.id: clip for clip in source.clips}
        self.old = read_index(folder) if is_index(folder) else None
        self.about = _about(model, source, request, self.old, folder)
        self.parts = Parts(folder / "parts", model.fingerprint)
        rows = zip(self.old.videos, self.old.vectors, strict=True) if self.old else ()
        self.known = {video["id"]: _Row(video, vector) for video, vector in rows}
        self.known |= {video["id"]: _Row(video, vector) for video, vector in self.parts.read()}

    def run(self) -> Indexed:
        same = {name for name, clip in self.clips.items() if name in self.known and self._is_as_it_was(clip)}
        broken = dict(self.source.broken)
        if not (self.clips or broken):
            raise UserError(f"{self.source.name}: holds no video" + ("; nothing is dropped" if self.known else ""))
        started = time.monotonic()
        new = [clip for clip in self.source.clips if clip.id not in same]
        broken |= find_unreadable(self.source.store, [clip.id for clip in new], self.model.config.num_workers)
        if not same and all(clip.id in broken for clip in new):
            kept = "; nothing is dropped" if self.known else ""
            raise UserError(f"{self.source.name}: none of its videos can be read{kept}:\n{listing(broken)}")
        fresh = self._embed([clip for clip in new if clip.id not in broken], broken)
        seconds = time.monotonic() - started
        rows = {name: fresh.get(name) or self.known[name] for name in self.clips if name in fresh or name in same}
        vanished = [name for name in self.known if name not in self.clips]
        if not self.request.sync:
            rows |= {name: self.known[name] for name in vanished}
        recall, asked = self._write(list(rows.values()))
        return Indexed(len(fresh), seconds, len(same), broken, vanished, len(rows), self.about, recall, asked)

    def _is_as_it_was(self, clip: Clip) -> bool:
        video = self.known[clip.id].video
        return (video["size"], video["mtime_ns"]) == clip.stamp

    def _embed(self, clips: list[Clip], broken: dict[str, str]) -> dict[str, _Row]:
        """By id; what fails on the way is added to `broken`."""
        fresh: dict[str, _Row] = {}
        for batch in embed_clips(self.model, self.source, clips, self.folder / THUMBS):
            broken |= batch.failed
            if batch.videos:
                self.parts.write(batch.videos, batch.vectors)
            fresh |= {v["id"]: _Row(v, vector) for v, vector in zip(batch.videos, batch.vectors, strict=True)}
        return fresh

    def _write(self, rows: list[_Row]) -> tuple[float | None, str]:
        """Everything to its place; gives the recall, and what it was measured with."""
        videos = [self._now(row.video) for row in rows]
        exact = np.array([row.vector for row in rows], np.float32).reshape(len(rows), self.model.width)
        write_index(self.folder, self.about, exact, videos)
        stored = read_index(self.folder)
        found = nearest.build(stored.vectors, self.about.kind)
        nearest.keep(self.folder, found, self.about.kind, stored.digest)
        self.parts.remove()
        remove_others(self.folder / THUMBS, (video["thumb"] for video in videos))
        rounded = any(row.vector.dtype == np.float16 for row in rows)
        if (self.about.kind, self.about.dtype) == ("flat", "float32") or rounded:
            return None, ""
        captions = [text for video in videos for text in video["captions"]]
        return recall_of(found, exact, captions, self.model.encode_text)

    def _now(self, video: Video) -> Video:
        """With what the source says of it today: a library may have moved, captions may have been added."""
        clip = self.clips.get(video["id"])
        return video if clip is None else video | {"path": str(clip.path), "captions": list(clip.captions)}


def _about(model: Retriever, source: Source, request: Request, old: StoredIndex | None, folder: Path) -> About:
    """What index.json will say. Raises UserError if the folder is an index of something else."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if old is not None:
        _check_same(model, source, request, old.about, folder)
    settings = {name: value for name, value in request.settings.items() if name not in _OF_THE_MACHINE}
    if model.config.clip_weights is not None:
        settings["clip_weights"] = str(Path(model.config.clip_weights).absolute())
    return About(
        fingerprint=model.fingerprint,
        run=str(model.source.absolute()),
        settings=settings,
        source=str(source.name),
        root=str(source.root),
        kind=request.kind or (old.about.kind if old else "flat"),
        dtype=request.dtype or (old.about.dtype if old else "float32"),
        made=old.about.made if old else now,
        changed=now,
    )


def _check_same(model: Retriever, source: Source, request: Request, about: About, folder: Path) -> None:
    if about.fingerprint != model.fingerprint:
        raise UserError(
            f"-o {folder}: is an index made with another model ({about.run}); give another name, or remove it"
        )
    if about.source != str(source.name) and Path(about.source).exists() and not request.sync:
        raise UserError(
            f"-o {folder}: is the index of {about.source}; give another name for that of {source.name}, or --sync to "
            "drop what is not there"
        )
    if about.dtype == "float16" and request.dtype == "float32":
        raise UserError(
            f"-o {folder}: holds float16, and what was rounded away cannot be had back; give another name, or remove it"
        )
