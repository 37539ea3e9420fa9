"""Pictures to search by, and small pictures of frames."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adaclip_finetune.data.images import IMAGE_FORMATS, to_rgb_image
from adaclip_finetune.errors import UserError

_THUMB_SIDE = 320  # pixels of the longer side


def open_picture(
    source: Path | io.BytesIO, formats: tuple[str, ...] = IMAGE_FORMATS, max_pixels: int | None = None
) -> Image.Image:
    """Return a picture, decoded. Raise UserError if it is none of these formats, is damaged, or has more pixels than
    allowed, which is found out before they are decoded."""
    where = f"{source}: " if isinstance(source, Path) else ""
    try:
        with Image.open(source, formats=formats) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                size = f"{image.width} × {image.height} pixels"
                raise UserError(f"{where}the picture has {size}; at most {max_pixels:,} are read")
            image.load()
            return image
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise all kinds of exceptions
        reason = getattr(error, "strerror", None) or f"cannot be decoded as {', '.join(formats)}"
        raise UserError(f"{where}not a picture that can be read: {reason}") from error


def seen_pixels(picture: Image.Image) -> NDArray[np.uint8]:
    """Return a picture as RGB (H, W, 3), at most four times as long as it is wide.

    The model looks at the middle square, but the whole picture is resized before: without this limit, one that is
    50,000 times as long as it is wide would fill the memory.
    """
    seen = to_rgb_image(picture)
    width, height = seen.size
    longest = 4 * min(width, height)
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return np.asarray(seen.crop((left, top, width - left, height - top)))


def thumbnail(frame: NDArray[np.uint8]) -> bytes:
    """Return a frame (H, W, 3) as a small JPEG."""
    picture, content = Image.fromarray(frame), io.BytesIO()
    picture.thumbnail((_THUMB_SIDE, _THUMB_SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    picture.save(content, "JPEG", quality=80)
    return content.getvalue()
