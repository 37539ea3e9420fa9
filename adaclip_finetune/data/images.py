"""Images as frames: one function that decodes every image, and what the stores of images share."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from adaclip_finetune.data.frame_store import FrameError, Kind, Scan
from adaclip_finetune.data.video.decoding import Stopped, never

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
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # `exif_transpose` copies an upright image, too
            image = ImageOps.exif_transpose(image)
    if image.mode == "F":  # floats from 0 to 1
        image = Image.fromarray((255 * np.clip(np.nan_to_num(np.asarray(image)), 0, 1)).round().astype(np.uint8))
    elif image.mode.startswith("I"):  # 16 bits, in one of several modes; `convert` would cut off all above 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return image if image.mode == "RGB" else image.convert("RGB")


class ImageStore(ABC):
    """What stores of single images share: a subclass counts the images of a video and finds their content."""

    @abstractmethod
    def count(self, video_id: str) -> int:
        """Return how many images the video has. Raises FrameError."""

    @abstractmethod
    def _images(self, video_id: str, indices: Sequence[int]) -> Iterable[tuple[Path, str, Path | io.BytesIO]]:
        """Give the file, the beginning of an error message and the content of each image. Raises FrameError."""

    def read(self, video_id: str, indices: Sequence[int]) -> NDArray[np.uint8]:
        images: dict[int, NDArray[np.uint8]] = {}
        different = sorted(set(indices))
        for index, (path, what, source) in zip(different, self._images(video_id, different), strict=True):
            try:
                images[index] = np.asarray(read_image(source))
            except Exception as error:  # Pillow's decoders raise whatever they stumble over
                # An error that the system reports, such as a missing permission, is no damage of the image.
                kind: Kind = "unreadable" if isinstance(error, OSError) and error.errno else "damaged"
                raise FrameError(video_id, path, f"{what}cannot be decoded ({error})", kind) from None
        shapes = {image.shape for image in images.values()}
        if len(shapes) > 1:
            raise FrameError(video_id, path, f"frames differ in size: {sorted(shapes)}", "sizes")
        return np.stack([images[index] for index in indices])

    def scan(self, video_id: str, stopped: Stopped = never) -> Scan:
        for index in range(self.count(video_id)):
            if stopped():
                return
            yield index, self.read(video_id, [index])[0]
