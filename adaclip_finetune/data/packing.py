"""Making a pack: `adaclip pack FRAMES_DIR -o data.lmdb`.

What is in the pack already stays there, so the same command continues after an interruption and adds new videos.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import lmdb
from PIL import Image
from tqdm import tqdm

from adaclip_finetune.data.annotations import check_name, load_annotations
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.images import IMAGE_FORMATS
from adaclip_finetune.data.names import canonical, differing_forms
from adaclip_finetune.data.packed_frames import LONGEST_KEY, NOT_A_PACK, PACK_KEY, PACK_VALUE, image_key, video_key
from adaclip_finetune.durable import beside
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import Lock
from adaclip_finetune.printable import printable

MAP_SIZE = 1 << 40  # bytes of address space, an upper bound of the file's size


def pack(frames_dir: Path, output: Path, annotations: Sequence[str], img_tmpl: str, overwrite: bool) -> int:
    """Pack the videos that the annotations list, or all below frames_dir. Return the exit code, 1 if some failed.

    Raises UserError if there is nothing to pack, `output` is something else, or the disk is full.
    """
    if output.suffix.lower() != ".lmdb" or output.is_dir():
        raise UserError(f"-o {printable(output)}: a pack is a file whose name ends in .lmdb")
    if not frames_dir.is_dir():
        raise UserError(f"{printable(frames_dir)}: there is no such folder")
    folder = FrameFolder(frames_dir, img_tmpl)
    videos = _listed(annotations) if annotations else _found(folder)
    lock = Lock(output.with_name(f".{output.name}.lock"), output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.take()
        # With --overwrite, the old pack stays until the new one is complete.
        part = beside(output) if overwrite and output.exists() else output
        if part != output:
            part.unlink(missing_ok=True)
        added, there, failed = _write(folder, videos, part)
        part.replace(output)
    except OSError as error:
        raise UserError(f"{printable(error.filename or output)}: {error.strerror or error}") from None
    except lmdb.Error as error:
        way_out = NOT_A_PACK if isinstance(error, lmdb.InvalidError) else "run the same command again to go on"
        raise UserError(f"{printable(output)}: cannot be written ({error}): {way_out}") from None
    finally:
        lock.release()
    before = f" ({there} of them were there already)" if there else ""
    print(f"{printable(output)}: {added + there} videos{before}, {output.stat().st_size / 1e6:.1f} MB")
    if failed:
        print(f"{len(failed)} could not be packed:", *failed, sep="\n")
    return 1 if failed else 0


def _write(folder: FrameFolder, videos: Sequence[str], path: Path) -> tuple[int, int, list[str]]:
    """Write a pack, or add to it. Return how many videos were added, how many it had, and a line for each that failed.

    Raises UserError if the file is another LMDB file or no video could be packed, and lmdb.Error.
    """
    added = there = 0
    failed: list[str] = []
    with lmdb.open(os.fsencode(path), subdir=False, lock=False, map_size=MAP_SIZE, metasync=False) as environment:
        with environment.begin(write=True) as transaction:
            is_new = transaction.stat()["entries"] == 0
            if is_new:
                transaction.put(PACK_KEY, PACK_VALUE)
            elif transaction.get(PACK_KEY) != PACK_VALUE:
                raise UserError(f"{printable(path)}: {NOT_A_PACK}")
        for video_id in tqdm(videos, "packing", unit="video", leave=False, disable=None):
            try:
                with environment.begin(write=True) as transaction:  # undone as a whole if reading an image fails
                    is_added = _pack_video(folder, video_id, transaction)
                added, there = added + is_added, there + (not is_added)
            except (FrameError, UserError) as error:
                failed.append(f"  {printable(error)}")
        environment.sync(True)
    if is_new and not added:
        path.unlink()
        raise UserError("\n".join([f"none of {len(videos)} videos could be packed:", *failed]))
    return added, there, failed


def _pack_video(folder: FrameFolder, video_id: str, transaction: lmdb.Transaction) -> bool:
    """Put a video into the pack; return False if the pack holds it already.

    Raises FrameError if its images are not whole, and UserError if no annotation could hold its name.
    """
    place = folder.video_folder(video_id)
    name = canonical(place.relative_to(folder.folder).as_posix())
    check_name(f"{video_id}: no annotation could name it", name)
    if len(video_key(name)) > LONGEST_KEY:
        raise FrameError(video_id, place, "its name is too long for a pack")
    if transaction.get(video_key(name)) is not None:
        return False
    record: dict[str, object] = {"images": folder.count(video_id)}
    for index in range(folder.count(video_id)):
        path = folder.path(video_id, index)
        try:
            content = path.read_bytes()
            Image.open(io.BytesIO(content), formats=IMAGE_FORMATS).close()
        except Exception as error:  # Pillow's readers raise whatever they stumble over
            raise FrameError(video_id, path, f"is not an image, or cannot be read ({error})") from None
        transaction.put(image_key(name, index), content)
    if (times := folder.times(video_id)) is not None:
        record["times"] = times.tolist()
    transaction.put(video_key(name), json.dumps(record).encode())
    return True


def _listed(annotations: Sequence[str]) -> list[str]:
    """Return the videos of all annotation files, each once."""
    videos = [video.video_id for name in annotations for video in load_annotations(name)]
    return list({canonical(video_id): video_id for video_id in videos}.values())


def _found(folder: FrameFolder) -> list[str]:
    """Return the folders below that hold images, and those that hold no folder either, which will be reported.

    Links are followed, but not to a folder above. Hidden folders are left out: extraction keeps what is not complete
    in one.
    """
    root, found = folder.folder, []
    for here, below, names in os.walk(root, onerror=lambda error: found.append(error.filename), followlinks=True):
        real = Path(here).resolve()
        below[:] = [
            name for name in below if not name.startswith(".") and not real.is_relative_to(Path(here, name).resolve())
        ]
        images = [name for name in sorted(names) if folder.number(name) is not None]
        if Path(here) != root and (images or not below):
            found.append(here)
        elif images:
            raise UserError(f"{printable(root)} holds images itself ({images[0]}): give the folder above it")
    if str(root) in found:
        raise UserError(f"{printable(root)}: cannot be listed")
    videos = sorted(Path(path).relative_to(root).as_posix() for path in found)
    if not videos:
        raise UserError(f"{printable(root)}: there are no folders in it, one for each video is expected")
    if message := differing_forms(videos):
        raise UserError(f"{printable(root)}: {message}")
    return videos
