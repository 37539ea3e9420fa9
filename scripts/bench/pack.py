"""Reading 16 uniform frames of each video from a folder of images against a pack of it: seconds, one process. The page
cache is emptied of the images before a cold pass (names and inodes stay, which favours the folder).

python scripts/bench/pack.py ../shared/data/msrvtt_frames/frames
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np

from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FrameStore
from adaclip_finetune.data.packed_frames import PackedFrames, image_key, video_key
from adaclip_finetune.data.packing import pack
from adaclip_finetune.data.sampling import frame_indices

TEMPLATE = "image_{:05d}.jpg"
PASSES = 3
VIDEOS = 400


def main(frames: Path, num_frm: int = 16) -> None:
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "data.lmdb"
        pack(frames, packed, [], TEMPLATE, False)
        videos = [path.name for path in sorted(frames.iterdir()) if path.is_dir()]
        videos = np.random.default_rng(0).permutation(videos)[:VIDEOS].tolist()
        files = [packed, *frames.rglob("*.jpg")]

        def whole(make: Callable[[], FrameStore]) -> None:
            store = make()
            for video in videos:
                store.read(video, frame_indices(store.count(video), num_frm).tolist())

        def folder_bytes() -> None:
            store = FrameFolder(frames, TEMPLATE)
            for video in videos:
                for index in set(frame_indices(store.count(video), num_frm).tolist()):
                    store.path(video, index).read_bytes()

        def pack_bytes() -> None:
            with lmdb.open(str(packed), subdir=False, readonly=True, lock=False) as opened, opened.begin() as reading:
                for video in videos:
                    count = json.loads(reading.get(video_key(video)))["images"]
                    for index in sorted(set(frame_indices(count, num_frm).tolist())):
                        reading.get(image_key(video, index))

        ways: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
            "files alone": (folder_bytes, pack_bytes),
            "with decoding": (
                lambda: whole(lambda: FrameFolder(frames, TEMPLATE)),
                lambda: whole(lambda: PackedFrames(packed)),
            ),
        }
        print(f"{len(videos)} videos, the middle of {PASSES} passes each")
        for name, pair in ways.items():
            for cold in (True, False):
                seconds = [np.median([timed(way, files if cold else []) for _ in range(PASSES)]) for way in pair]
                ratio = seconds[0] / seconds[1]
                state = "cold" if cold else "warm"
                print(f"{name:14} {state}: folder {seconds[0]:6.2f} s, pack {seconds[1]:6.2f} s, ratio {ratio:.2f}")


def timed(way: Callable[[], None], forget: list[Path]) -> float:
    """Seconds, after the page cache has been told to forget these files."""
    for path in forget:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(Path(sys.argv[1]))
