"""Images as frames: one function that decodes every image, and helpers for stores of images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from adaclip_finetune.data.frame_store import FrameError, FrameStore, Scan
from adaclip_finetune.data.video.decoding import Stopped

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")


def read_image(source: Path | io.BytesIO) -> Image.Image:
    """Return an image file as it is meant to be seen: upright, RGB with 8 bits a channel, white where transparent.

    Frames in folders, frames in packs and pictures to search by are all read by this function. Raises OSError if the
    file cannot be opened, and whatever Pillow's decoders raise (OSError, SyntaxError, ValueError, …) if it is damaged.
    """
    with Image.open(source, formats=IMAGE_FORMATS) as image:
        image.load()
        return to_rgb_image(image)


def to_rgb_image(image: Image.Image) -> Image.Image:
    """Return a decoded image as `read_image` describes. Shape (H, W) becomes (W, H) where EXIF turns the image."""
    with suppress(Exception):  # a camera's notes beside the picture may hold anything; the picture itself is sound
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":  # floats from 0 to 1
        image = Image.fromarray((255 * np.clip(np.nan_to_num(np.asarray(image)), 0, 1)).round().astype(np.uint8))
    elif image.mode.startswith("I"):  # 16 bits, in one of several modes; `convert` would cut off all above 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return image.convert("RGB")


def stacked(
    images: Mapping[int, NDArray[np.uint8]], indices: Sequence[int], video_id: str, path: Path
) -> NDArray[np.uint8]:
    """Return the images with these indices, RGB (n, H, W, 3). Raises FrameError if they differ in size."""
    shapes = {image.shape for image in images.values()}
    if len(shapes) > 1:
        raise FrameError(video_id, path, f"frames differ in size: {sorted(shapes)}", "sizes")
    return np.stack([images[i] for i in indices])


def one_by_one(store: FrameStore, video_id: str, stopped: Stopped) -> Scan:
    """Implement `FrameStore.scan` for a store in which no frame depends on another one."""
    for index in range(store.count(video_id)):
        if stopped():
            return
        yield index, store.read(video_id, [index])[0]
