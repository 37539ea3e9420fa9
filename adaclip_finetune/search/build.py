"""`adaclip index`: embed the videos that are new or changed, keep the others, and write the index of all."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.readable import find_unreadable, listing
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import FolderLock
from adaclip_finetune.search import nearest
from adaclip_finetune.search.about import About, Recall
from adaclip_finetune.search.embed import Video, embed_clips
from adaclip_finetune.search.parts import Parts
from adaclip_finetune.search.recall import recall_of
from adaclip_finetune.search.request import Request, about_for
from adaclip_finetune.search.retriever import Retriever
from adaclip_finetune.search.stored import (
    MARK,
    THUMBS,
    digest_of,
    finish_move,
    is_index,
    read_index,
    write_index,
)
from adaclip_finetune.search.thumbnails import remove_others
from adaclip_finetune.search.videos import Clip, Source


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


def index_videos(model: Retriever, source: Source, folder: Path, request: Request) -> Indexed:
    """Raises UserError; what was embedded until then is kept, and the same call goes on from there."""
    model.refuse_query_dependent()
    was_there = folder.exists()
    _make_ours(folder)
    lock = FolderLock(folder)
    try:
        lock.take()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written into ({error.strerror})") from error
    try:
        finish_move(folder)
        (folder / THUMBS).mkdir(exist_ok=True)
        return _Indexing(model, source, folder, request).run()
    except OSError as error:
        raise UserError(f"{folder}: {error}. What is finished is kept; the same command goes on") from error
    finally:
        lock.release()
        if not was_there:
            _remove_if_bare(folder)


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


def _remove_if_bare(folder: Path) -> None:
    """What was refused, or stopped before its first batch, leaves nothing behind."""
    with suppress(OSError):  # there are pictures, say
        if {path.name for path in folder.iterdir()} <= {MARK, THUMBS}:
            (folder / THUMBS).rmdir()
            (folder / MARK).unlink()
            folder.rmdir()


class _Row(NamedTuple):
    video: Video
    vector: NDArray[Any]  # (D,)


class _Indexing:
    """One run of the command, its folder being locked."""

    def __init__(self, model: Retriever, source: Source, folder: Path, request: Request) -> None:
        self.model, self.source, self.folder, self.request = model, source, folder, request
        self.clips = {clip.id: clip for clip in source.clips}
        self.old = read_index(folder) if is_index(folder) else None
        self.about = about_for(model, source, request, self.old.about if self.old else None, folder)
        of = {"model": model.fingerprint, "source": str(source.name), "root": str(source.root)}
        self.parts = Parts(folder / "parts", of | {"img_tmpl": source.img_tmpl or ""})
        rows = zip(self.old.lines, self.old.vectors, strict=True) if self.old else ()
        self.known = {video["id"]: _Row(video, vector) for video, vector in rows}
        self.of_other_frames = set(self.known) if self._frames_are_called_otherwise() else set()
        parts = {video["id"]: _Row(video, vector) for video, vector in self.parts.read()}
        self.known |= parts
        self.of_other_frames -= set(parts)

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
        about = self._write(list(rows.values()))
        return Indexed(len(fresh), seconds, len(same), broken, vanished, len(rows), about)

    def _frames_are_called_otherwise(self) -> bool:
        """Whether another `img_tmpl` makes other images of the same folders frames."""
        tmpl = self.source.img_tmpl
        return self.old is not None and tmpl is not None and self.old.about.settings.get("img_tmpl") != tmpl

    def _is_as_it_was(self, clip: Clip) -> bool:
        video = self.known[clip.id].video
        if video["thumb"] and not (self.folder / THUMBS / video["thumb"]).is_file():
            return False
        return clip.id not in self.of_other_frames and (video["size"], video["mtime_ns"]) == clip.stamp

    def _embed(self, clips: list[Clip], broken: dict[str, str]) -> dict[str, _Row]:
        """By id; what fails on the way is added to `broken`."""
        fresh: dict[str, _Row] = {}
        for batch in embed_clips(self.model, self.source, clips, self.folder / THUMBS):
            broken |= batch.failed
            if batch.videos:
                self.parts.write(batch.videos, batch.vectors)
            fresh |= {v["id"]: _Row(v, vector) for v, vector in zip(batch.videos, batch.vectors, strict=True)}
        return fresh

    def _write(self, rows: list[_Row]) -> About:
        """Everything to its place; gives what index.json says now."""
        videos = [self._now(row.video) for row in rows]
        exact = np.array([row.vector for row in rows], np.float32).reshape(len(rows), self.model.width)
        vectors = exact.astype(self.about.dtype)
        digest = digest_of(vectors)
        found = nearest.load(self.folder, vectors, self.about.kind, digest)
        about, old = self.about, self.old
        if old is not None and (digest, about.kind) == (old.digest, old.about.kind):
            about = replace(about, recall=old.about.recall)
            if (replace(about, changed=old.about.changed), videos) == (old.about, old.videos):
                about = old.about
        else:
            rounded = sum(row.vector.dtype == np.float16 for row in rows)
            about = replace(about, recall=self._recall(found, exact, videos, rounded))
        if about is not (old and old.about):  # whoever has loaded it would think that there is something new
            write_index(self.folder, about, vectors, videos)
        nearest.keep(self.folder, found, about.kind, digest)
        self.parts.remove()
        remove_others(self.folder / THUMBS, (video["thumb"] for video in videos))
        return about

    def _recall(
        self, found: nearest.Nearest, exact: NDArray[np.float32], videos: list[Video], rounded: int
    ) -> Recall | None:
        """`rounded` rows have been in float16 already: what that has cost cannot be seen any more."""
        if self.about.kind == "flat" and rounded == len(exact):
            return self.old.about.recall if self.old and self.old.about.kind == "flat" else None
        if (self.about.kind, self.about.dtype) == ("flat", "float32"):
            return None
        captions = [text for video in videos for text in video["captions"]]
        share, asked = recall_of(found, exact, captions, self.model.encode_text)
        by = f"exact search, {rounded} of {len(exact)} vectors being float16 already" if rounded else "exact float32"
        return None if share is None else Recall(share, by, asked, len(exact))

    def _now(self, video: Video) -> Video:
        """With what the source says of it today: a library may have moved, captions may have been added."""
        clip = self.clips.get(video["id"])
        return video if clip is None else video | {"path": str(clip.path), "captions": list(clip.captions)}
