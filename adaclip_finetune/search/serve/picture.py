"""A picture that somebody sent: decoded if it is one of a few formats, and not larger than it should be."""

from __future__ import annotations

import io

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000  # 200 MB decoded


class BadPicture(Exception):
    """What is wrong with it; `too_large` where a smaller one would do."""

    def __init__(self, reason: str, too_large: bool = False) -> None:
        super().__init__(reason)
        self.too_large = too_large


def decode_picture(content: bytes) -> Image.Image:
    """Raises BadPicture. The size is looked at before any pixel is decoded."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadPicture(
                    f"this picture has {image.width} × {image.height} pixels; {MAX_PIXELS / 1e6:.0f} million are read",
                    too_large=True,
                )
            image.load()
            return image
    except BadPicture:
        raise
    except Image.DecompressionBombError:
        raise BadPicture(f"this picture has more than {MAX_PIXELS / 1e6:.0f} million pixels", too_large=True) from None
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise BadPicture(
            f"this is no picture that can be read here ({', '.join(FORMATS)}), or it is damaged"
        ) from error
