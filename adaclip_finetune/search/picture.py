"""A picture as it is meant to be seen: upright, eight bits a colour, and white where it is transparent."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from adaclip_finetune.data.images import IMAGE_FORMATS
from adaclip_finetune.errors import UserError


def open_picture(path: Path) -> Image.Image:
    """Decoded. Raises UserError."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            image.load()
            return image
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        kinds = ", ".join(IMAGE_FORMATS)
        reason = getattr(error, "strerror", None) or f"cannot be decoded as one of {kinds}"
        raise UserError(f"{path}: {reason}; a picture is needed") from error


def seen_pixels(picture: Image.Image) -> NDArray[np.uint8]:
    """RGB (H, W, 3), without ends that are too far away to be looked at."""
    with suppress(Exception):  # what a camera wrote beside the picture may be anything
        picture = ImageOps.exif_transpose(picture)
    return np.asarray(_on_white(_in_eight_bits(_without_far_ends(picture))))


def _without_far_ends(picture: Image.Image) -> Image.Image:
    """Only the middle square is looked at, but all of a picture is brought to size for it: of one that is as long as a
    thread that would fill the memory."""
    width, height = picture.size
    longest = 4 * min(width, height)
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return picture.crop((left, top, width - left, height - top)) if left or top else picture


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    """Pillow by itself cuts larger values off."""
    if picture.mode == "F":
        return Image.fromarray((255 * np.clip(np.nan_to_num(np.asarray(picture)), 0, 1)).round().astype(np.uint8))
    if picture.mode.startswith("I"):  # 16 bits, whichever way they are kept
        return Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
    return picture


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    above = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
