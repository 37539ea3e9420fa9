"""CPU time of reading 16 uniform frames in place, compared with decoding the whole video; and of a later run, compared
with the first one, which has to scan the files. One thread.

python scripts/bench/decode.py ../shared/data/panda70m/videos
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np

from adaclip_finetune.data.preprocess import ImageSpec, to_square
from adaclip_finetune.data.sampling import frame_indices
from adaclip_finetune.data.video.file import read_frames
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.data.video.index import index_video


def decode_all(path: Path, converted: set[int] | None) -> None:
    """Decode every frame; convert all to RGB, or only these."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for i, frame in enumerate(container.decode(video=0)):
            if converted is None or i in converted:
                frame.to_ndarray(format="rgb24", threads=1)


def main(folder: Path, num_frm: int = 16) -> None:
    spec = ImageSpec(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    seconds: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time()
        result = function(*arguments)
        seconds.setdefault(name, []).append(time.process_time() - start)
        return result

    paths = sorted(folder.glob("*.mp4"))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        for run in ("first run", "later runs"):
            store = VideoFolder(folder)
            for path in paths:
                timed(f"count frames, {run}", store.count, path.stem)
            store.remember()
        cached = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
    for path in paths:
        index = index_video(path)
        wanted = frame_indices(index.num_frames, num_frm).tolist()
        frames = timed(f"read {num_frm} frames", read_frames, path, index, wanted)
        timed("bring them to 224 x 224", to_square, frames, spec)
        timed("decode all, convert all", decode_all, path, None)
        timed(f"decode all, convert {num_frm}", decode_all, path, set(wanted))
    base = np.array(seconds[f"read {num_frm} frames"])
    print(f"{len(paths)} videos; known of them after the first run: {cached / len(paths):.0f} bytes each")
    for name, values in seconds.items():
        total, median = sum(values) / base.sum(), np.median(np.array(values) / base)
        print(f"{name:28} {1e3 * np.mean(values):8.2f} ms a video, {total:6.3f} x reading (median {median:.2f})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
