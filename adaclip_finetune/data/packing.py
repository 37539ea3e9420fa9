"""The making of a pack: `adaclip pack FRAMES_DIR -o data.lmdb`.

The file grows in a hidden folder beside its place and is renamed when it is complete, so that nobody ever reads a part
of one. A video's record is written after its images: what has a record is finished, and a run that was interrupted goes
on after it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import lmdb
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from adaclip_finetune.data.annotations import check_name, load_annotations
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.images import IMAGE_FORMATS
from adaclip_finetune.data.pack import BrokenPack, Contents, Pack, VideoRecord
from adaclip_finetune.data.pack_writer import PackWriter
from adaclip_finetune.durable import beside, flush_folder
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import FolderLock
from adaclip_finetune.printable import printable

SUFFIX = ".lmdb"


@dataclass
class _Outcome:
    """What was packed now and earlier, and why the others were not: video → reason."""

    records: list[VideoRecord] = field(default_factory=list)
    earlier: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def pack(frames_dir: Path, output: Path, annotations: Sequence[str], img_tmpl: str, overwrite: bool) -> int:
    """Pack the videos that the annotations list, or all below frames_dir; returns the exit code, 1 if some failed.

    UserError: nothing to pack, another pack in the way, or no room (what is packed stays for the next run).
    """
    if output.suffix.lower() != SUFFIX:
        raise UserError(f"-o {printable(output)}: the name of a pack ends in {SUFFIX}")
    folder = FrameFolder(frames_dir, img_tmpl)
    try:
        if output.is_dir():
            raise UserError(f"-o {printable(output)}: is a folder")
        if not frames_dir.is_dir():
            raise UserError(f"{printable(frames_dir)}: there is no such folder")
        videos = _listed(annotations) if annotations else _found(folder)
        if output.exists() and not overwrite:
            return _compare(Pack(output), folder, videos)
        output.parent.mkdir(parents=True, exist_ok=True)
        with _work_folder(output) as work:
            return _pack(folder, videos, work / output.name, output)
    except FrameError as error:  # of frames_dir itself
        raise UserError(f"{printable(error.path)}: {error.reason}") from error
    except OSError as error:
        raise UserError(f"{printable(error.filename or output)}: {error.strerror or error}") from error


def _pack(folder: FrameFolder, videos: list[str], part: Path, output: Path) -> int:
    outcome = _Outcome()
    try:
        with PackWriter(part) as writer:
            for video_id in tqdm(videos, "packing", unit="video", leave=False, disable=None):
                _pack_video(folder, video_id, writer, outcome)
            if not outcome.records:
                raise UserError(f"none of {len(videos)} videos could be packed:\n{_listing(outcome.failed)}")
            images, size = sum(r.images for r in outcome.records), sum(r.size for r in outcome.records)
            writer.finish(outcome.records, Contents(folder.img_tmpl, len(outcome.records), images, size))
    except (BrokenPack, lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError):
        raise UserError(
            f"{printable(part)} was left by a run that did not finish, and is damaged: delete it and run the same "
            "command again"
        ) from None
    except lmdb.Error as error:
        free = shutil.disk_usage(part.parent).free / 1e6  # LMDB calls a full disk an I/O error
        raise UserError(
            f"{printable(part)}: {error.reason} ({free:.1f} MB are free there). What was packed until then stays: make "
            "room, or mend what is wrong, and run the same command again"
        ) from None
    part.replace(output)
    flush_folder(output.parent)
    earlier = f" ({outcome.earlier} of them earlier)" if outcome.earlier else ""
    print(
        f"{printable(output)}: {len(outcome.records)} videos{earlier}, {images} images of {size / 1e6:.1f} MB, in "
        f"{output.stat().st_size / 1e6:.1f} MB"
    )
    return _tell(outcome.failed)


def _pack_video(folder: FrameFolder, video_id: str, writer: PackWriter, outcome: _Outcome) -> None:
    try:
        record = _record(folder, video_id)
        if writer.record(video_id) == record:
            outcome.earlier += 1
        else:
            writer.add(record, _images(folder, record))
    except FrameError as error:
        outcome.failed[video_id] = f"{error.path}: {error.reason}"
    else:
        outcome.records.append(record)


def _record(folder: FrameFolder, video_id: str) -> VideoRecord:
    """The video as its folder is now. Raises FrameError if the folder is not whole, or no annotation could name it."""
    try:
        check_name("no annotation could name it", video_id)
    except UserError as error:
        raise FrameError(video_id, folder.folder / video_id, str(error).partition(";")[0]) from None
    listing, size = hashlib.sha256(), 0
    count = folder.count(video_id)
    for index in range(count):
        path = folder.path(video_id, index)
        try:
            facts = path.stat()
        except OSError as error:
            raise FrameError(video_id, path, error.strerror or str(error)) from None
        listing.update(f"{path.name}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
        size += facts.st_size
    return VideoRecord(video_id, count, size, listing.hexdigest())


def _images(folder: FrameFolder, record: VideoRecord) -> Iterator[bytes]:
    """The images as they are on disk, each opened but not decoded. Raises FrameError."""
    size = 0
    for index in range(record.images):
        path = folder.path(record.video_id, index)
        try:
            content = path.read_bytes()
            Image.open(io.BytesIO(content), formats=IMAGE_FORMATS).close()
        except Exception as error:  # Pillow's readers raise whatever they stumble over
            reason = "is no image" if isinstance(error, UnidentifiedImageError) else f"cannot be read ({error})"
            raise FrameError(record.video_id, path, reason) from None
        size += len(content)
        yield content
    if size != record.size:
        raise FrameError(record.video_id, folder.folder / record.video_id, "changed while it was packed")


def _listed(annotations: Sequence[str]) -> list[str]:
    """The videos of all annotation files, each once."""
    return list(dict.fromkeys(video.video_id for name in annotations for video in load_annotations(name)))


def _found(folder: FrameFolder) -> list[str]:
    """The folders below that hold images, or nothing at all (which will be told)."""
    if folder.numbers("."):
        name = folder.img_tmpl.format(1)
        raise UserError(f"{printable(folder.folder)} holds images itself ({name}): give the folder above it")
    if videos := sorted(_folders_below(folder, "", ())):
        return videos
    raise UserError(f"{printable(folder.folder)}: there are no folders in it, one a video is expected")


def _folders_below(folder: FrameFolder, name: str, above: tuple[str, ...]) -> Iterator[str]:
    """Hidden folders are none: extraction keeps what is not complete in one. Links are followed, but not in circles."""
    here = folder.folder / name
    try:
        with os.scandir(here) as entries:
            below = [
                entry.name
                for entry in entries
                if not entry.name.startswith(".") and folder.number(entry.name) is None and _may_be_folder(entry)
            ]
    except OSError:  # is told when its images are asked for
        below = []
    if name and (not below or folder.numbers(name)):
        yield name
    above = (*above, os.path.realpath(here))
    for child in below:
        if os.path.realpath(here / child) not in above:
            yield from _folders_below(folder, f"{name}/{child}" if name else child, above)


def _may_be_folder(entry: os.DirEntry[str]) -> bool:
    """True for a link behind a closed folder: that it cannot be followed will be told, so that no video is lost."""
    try:
        return entry.is_dir()
    except OSError as error:
        return error.errno != errno.ELOOP  # which leads to nothing


def _compare(there: Pack, folder: FrameFolder, videos: list[str]) -> int:
    """What is said of a pack that is there already. UserError unless it holds these videos as packing would."""
    failed, lacking, changed = {}, [], []
    others = there.contents.videos
    for video_id in tqdm(videos, "comparing", unit="video", leave=False, disable=None):
        try:
            then = there.record(video_id)
            others -= then is not None
            now = _record(folder, video_id)
        except FrameError as error:
            failed[video_id] = f"{error.path}: {error.reason}"
            continue
        except BrokenPack as error:
            raise UserError(f"{printable(there.path)}: {error}") from None
        if then is None:
            lacking.append(video_id)
        elif then != now:
            changed.append(video_id)
    if lacking or changed:
        example = printable((lacking + changed)[0])
        raise UserError(
            f"{printable(there.path)} is there already; of {len(videos)} videos it lacks {len(lacking)}, and "
            f"{len(changed)} have changed since ({example}, …): --overwrite packs all of them anew"
        )
    more = f"; it holds {others} besides them" if others else ""
    print(f"{printable(there.path)} holds them already: {len(videos) - len(failed)} videos, nothing to do{more}")
    return _tell(failed)


def _tell(failed: Mapping[str, str]) -> int:
    if failed:
        print(f"{len(failed)} could not be packed:\n{_listing(failed)}")
    return 1 if failed else 0


def _listing(failed: Mapping[str, str]) -> str:
    return "\n".join(f"  {printable(video_id)}: {printable(reason)}" for video_id, reason in failed.items())


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """The hidden folder where the file grows, ours alone."""
    work = beside(output)
    work.mkdir(exist_ok=True)
    lock = FolderLock(work)
    lock.take()
    try:
        yield work
    finally:
        lock.release()
        with suppress(OSError):  # not finished
            work.rmdir()
