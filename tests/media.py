"""Small videos and frame folders whose frames say which they are: a row of black and white blocks spells the index."""

from pathlib import Path

import av
import numpy as np
from PIL import Image

BITS = 8


def coded_frame(index: int, height: int = 66, width: int = 130) -> np.ndarray:
    """RGB (height, width, 3): grey noise below, the bits of the index as blocks above."""
    frame = np.random.default_rng(index).integers(96, 160, (height, width, 3), dtype=np.uint8)
    for bit in range(BITS):
        left, right = bit * width // BITS, (bit + 1) * width // BITS
        frame[: height // 2, left:right] = 235 if index >> bit & 1 else 16
    return frame


def index_of(frame: np.ndarray) -> int:
    """Read the blocks of a frame (H, W, 3), whatever encoding and resizing did to it."""
    height, width, _ = frame.shape
    middles = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    return sum(1 << bit for bit, x in enumerate(middles) if frame[height // 5, x].mean() > 128)


def write_video(
    path: Path, num_frames: int, codec: str = "libx264", height: int = 66, width: int = 130, **options: str
) -> Path:
    """A video of coded frames; by default H.264 with B-frames and a key frame every 12.

    The bytes of H.264 are the same in every run: x264's code for particular processors, which is not deterministic
    with AVX-512, is switched off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    defaults = {"g": "12", "bf": "3", "crf": "20"}
    if codec == "libx264":
        defaults["x264-params"] = "threads=1:asm=0"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=defaults | options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(coded_frame(index, height, width), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_frames(folder: Path, num_frames: int, height: int = 66, width: int = 130, suffix: str = "jpg") -> Path:
    """image_00001.jpg … of coded frames."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_frames):
        Image.fromarray(coded_frame(index, height, width)).save(folder / f"image_{index + 1:05d}.{suffix}")
    return folder
