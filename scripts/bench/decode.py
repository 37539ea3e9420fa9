"""How much reading 16 uniform frames in place saves over decoding the whole video: CPU seconds, one thread.

python scripts/bench/decode.py ../shared/data/panda70m/videos
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np

from adaclip_finetune.data.preprocess import ImageSpec, to_square
from adaclip_finetune.data.sampling import frame_indices
from adaclip_finetune.data.video_file import index_video, read_frames


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
    for path in paths:
        index = timed("index, once a run", index_video, path)
        wanted = frame_indices(index.num_frames, num_frm).tolist()
        frames = timed(f"read {num_frm} frames", read_frames, path, index, wanted)
        timed("bring them to 224 x 224", to_square, frames, spec)
        timed("decode all, convert all", decode_all, path, None)
        timed(f"decode all, convert {num_frm}", decode_all, path, set(wanted))
    base = np.array(seconds[f"read {num_frm} frames"])
    print(f"{len(paths)} videos")
    for name, values in seconds.items():
        total, median = sum(values) / base.sum(), np.median(np.array(values) / base)
        print(f"{name:28} {1e3 * np.mean(values):7.1f} ms a video, {total:5.2f} x reading (median {median:.2f})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
