"""Images as frames: decoded, of one size, and one by one."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adaclip_finetune.data.frame_store import FrameError, FrameStore, Scan
from adaclip_finetune.data.video.decoding import Stopped

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")


def decoded(source: Path | io.BytesIO) -> NDArray[np.uint8]:
    """RGB (H, W, 3). Pillow's decoders raise whatever they stumble over."""
    with Image.open(source, formats=IMAGE_FORMATS) as image:
        return np.asarray(image.convert("RGB"))


def stacked(
    images: Mapping[int, NDArray[np.uint8]], indices: Sequence[int], video_id: str, path: Path
) -> NDArray[np.uint8]:
    """RGB (n, H, W, 3). Raises FrameError where images differ in size."""
    shapes = {image.shape for image in images.values()}
    if len(shapes) > 1:
        raise FrameError(video_id, path, f"frames differ in size: {sorted(shapes)}", "sizes")
    return np.stack([images[i] for i in indices])


def one_by_one(store: FrameStore, video_id: str, stopped: Stopped) -> Scan:
    """`scan` where no frame needs another one."""
    for index in range(store.count(video_id)):
        if stopped():
            return
        yield index, store.read(video_id, [index])[0]
