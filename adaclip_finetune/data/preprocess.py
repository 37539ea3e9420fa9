"""Prepare decoded frames for the towers.

Frames are resized by Pillow (whose bicubic filter antialiases) and cropped as CLIP (Radford et al. 2021) does with
images. They stay uint8 until they are on the device, where `normalise` does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from adaclip_finetune.data.frame_store import Frames
from adaclip_finetune.data.frame_vectors import FrameVectors

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class ImageSpec:
    """How a frame is prepared for a network: `size` pixels square, normalised with `mean` and `std` (of values 0…1).

    resize_mode `shortest` resizes the shorter side to `resize_to` pixels (None: to `size`) and crops the centre;
    `squash` resizes both sides to `size`. `grey`: one channel instead of three.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    resize_to: int | None = None
    grey: bool = False

    @property
    def channels(self) -> int:
        """The number of channels, 1 or 3."""
        return 1 if self.grey else 3

    def __post_init__(self) -> None:
        if self.interpolation not in FILTERS or self.resize_mode not in ("shortest", "squash"):
            raise ValueError(f"unknown preprocessing: {self.interpolation}, {self.resize_mode}")


IMAGENET = ImageSpec(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize_to=256)
"""The input of torchvision's CNNs, which are used as policy backbones."""


class Views(NamedTuple):
    """How the reader prepares each frame: one view for CLIP, and one for the frame selector if it needs its own.

    With `vectors` it reads no frames, but what is kept of them.
    """

    clip: ImageSpec
    selector: ImageSpec | None = None
    vectors: FrameVectors | None = None

    @property
    def specs(self) -> list[ImageSpec]:
        """The views that are made of each frame, that for CLIP first."""
        return [self.clip] if self.selector is None else [self.clip, self.selector]


class CropFlip(NamedTuple):
    """A part of each frame of a clip, whether it is mirrored, and the filter that resizes it to a square.

    Place and size are shares of the sides of a frame, so that frames of several sizes and all views show the same part.
    """

    top: float
    left: float
    height: float
    width: float
    mirrored: bool
    interpolation: str

    def cut(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the part of a frame (H, W, 3)."""
        high, wide, _ = frame.shape
        top, left = round(self.top * high), round(self.left * wide)
        bottom, right = top + max(1, round(self.height * high)), left + max(1, round(self.width * wide))
        part = frame[top:bottom, left:right]
        return np.ascontiguousarray(part[:, ::-1] if self.mirrored else part)


def draw_crop_flip(height: int, width: int, random: np.random.Generator, smallest: float = 0.5) -> CropFlip:
    """Draw a part of frames of this size: `smallest` to 1 of the area, 3:4 to 4:3 wide (Szegedy et al. 2015; the
    default is FitCLIP's).

    The filter is bilinear or bicubic, and half of all clips are mirrored. Very wide or high frames, into which no part
    of ten fits, give the largest possible part of their middle.
    """
    for _ in range(10):
        area, ratio = height * width * random.uniform(smallest, 1), math.exp(random.uniform(-1, 1) * math.log(4 / 3))
        high, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < high <= height and 0 < wide <= width:
            top, left = int(random.integers(height - high + 1)), int(random.integers(width - wide + 1))
            break
    else:
        high, wide = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
        top, left = (height - high) // 2, (width - wide) // 2
    filter, mirrored = ("bilinear", "bicubic")[random.integers(2)], bool(random.integers(2))
    return CropFlip(top / height, left / width, high / height, wide / width, mirrored, filter)


def to_square(frames: Frames, spec: ImageSpec, part: CropFlip | None = None) -> NDArray[np.uint8]:
    """Resize and crop decoded frames as `spec` says: n arrays (H, W, 3), perhaps of several sizes → (n, C, S, S).

    A `part` of the frames is stretched to the square instead. Pixels stay uint8 and are not normalised.
    """
    return to_squares(frames, [spec], part)[0]


def to_squares(frames: Frames, specs: Sequence[ImageSpec], part: CropFlip | None = None) -> list[NDArray[np.uint8]]:
    """Return the same frames as each of several networks gets them; see `to_square`."""
    if part is not None:
        specs = [replace(spec, resize_mode="squash", interpolation=part.interpolation) for spec in specs]
    views = [np.empty((len(frames), spec.channels, spec.size, spec.size), np.uint8) for spec in specs]
    for i, frame in enumerate(frames):
        image = Image.fromarray(frame if part is None else part.cut(frame))
        for view, spec in zip(views, specs, strict=True):
            square = np.asarray(_square(image, spec))
            view[i] = square if spec.grey else square.transpose(2, 0, 1)
    return views


def _square(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Return an image resized and cropped, in grey if `spec` says so.

    Of a wide image, only what the crop keeps is resized. That is the crop of the resized image, but for the rounding of
    some pixels: Pillow holds the edges of a box in single precision. With a box, it would resize the sides of a high
    image in the other order, which makes larger differences.
    """
    width, height = _resized_size(*image.size, spec)
    left, top = round((width - spec.size) / 2), round((height - spec.size) / 2)
    crop = left, top, left + spec.size, top + spec.size
    if image.size != (width, height) and width > height:
        across, down = image.width / width, image.height / height
        box = crop[0] * across, crop[1] * down, crop[2] * across, crop[3] * down
        image = image.resize((spec.size, spec.size), FILTERS[spec.interpolation], box)
    else:
        if image.size != (width, height):
            image = image.resize((width, height), FILTERS[spec.interpolation])
        if crop != (0, 0, width, height):
            image = image.crop(crop)
    return image.convert("L") if spec.grey else image


def normalise(frames: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Convert uint8 (…, C, H, W) to float32 (x / 255 - mean) / std, on the device where the frames are."""
    return (frames.float() / 255 - _channels(mean, frames.device)) / _channels(std, frames.device)


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return one value for each channel, (C, 1, 1). It is kept, since a copy to a device would wait for the device."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(-1, 1, 1)


def _resized_size(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    if spec.resize_mode == "squash":
        return spec.size, spec.size
    short = spec.resize_to or spec.size
    if height <= width:
        return int(short * width / height), short
    return short, int(short * height / width)
