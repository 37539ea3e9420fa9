"""Row `reading`: 32 of 250 frames as CLIP and the frame selector get them, from JPEGs and from a video file."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from PIL import Image

from adaclip_finetune.bench.measure import Aim, Measured, Setup, check, in_turns
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FrameStore
from adaclip_finetune.data.preprocess import FILTERS, IMAGENET, ImageSpec, to_squares
from adaclip_finetune.data.sampling import frame_indices
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.data.video.program import find_program

Views = tuple[NDArray[np.uint8], NDArray[np.uint8]]

_CLIP = ImageSpec(224, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
_TEMPLATE = "image_{:05d}.jpg"


def reading(setup: Setup) -> Iterator[Measured]:
    """Compare the frame stores with Pillow, and the video file with extracting all frames before they are read.

    "in place" counts the frames of the file first, as the first epoch does; "in place, again" knows them.
    """
    size, seconds, count = ("480x270", 1, 4) if setup.quick else ("640x360", 10, 32)
    with TemporaryDirectory() as name:
        folder, program = Path(name), find_program()
        (folder / "videos").mkdir()
        video = write_video(folder / "videos" / "v.mp4", size, seconds)
        _extract(program, video, folder / "frames" / "v")
        indices = frame_indices(25 * seconds, count).tolist()
        images = [folder / "frames" / "v" / _TEMPLATE.format(index + 1) for index in indices]
        stored, known = FrameFolder(folder / "frames", _TEMPLATE), VideoFolder(video.parent)
        for which, own, plain in zip(("CLIP", "selector"), _views(stored, indices), _plain(images), strict=True):
            check(f"the pixels for the {which}", torch.from_numpy(own), torch.from_numpy(plain).double(), 1.5 / 255)

        def extract_and_read() -> Views:
            _extract(program, video, folder / "extracted")
            return _plain([folder / "extracted" / path.name for path in images])

        seconds_by_name = in_turns(
            setup,
            {
                "Pillow": partial(_plain, images),
                "JPEGs": partial(_views, stored, indices),
                "extract, then Pillow": extract_and_read,
                "in place": lambda: _views(VideoFolder(video.parent), indices),
                "in place, again": partial(_views, known, indices),
            },
        )
    aims = [Aim("JPEGs", "Pillow", 1.5), Aim("in place", "extract, then Pillow", 3), Aim("in place, again", "Pillow")]
    yield Measured(f"{count} of {25 * seconds} frames, {size}", seconds_by_name, aims)


def write_video(path: Path, size: str, seconds: int) -> Path:
    """Write a moving and noisy picture of this size, 25 frames a second."""
    picture = f"testsrc2=size={size}:rate=25:duration={seconds},noise=alls=12:allf=t:all_seed=1"
    _ffmpeg(find_program(), "-f", "lavfi", "-i", picture, "-pix_fmt", "yuv420p", str(path))
    return path


def _views(store: FrameStore, indices: Sequence[int]) -> Views:
    assert store.count("v") > max(indices)
    clip, selector = to_squares(store.read("v", indices), [_CLIP, IMAGENET])
    return clip, selector


def _plain(images: Sequence[Path]) -> Views:
    """Return both views: decode each image whole, resize its shorter side and crop the middle."""
    decoded = [Image.open(path).convert("RGB") for path in images]
    views = []
    for spec in (_CLIP, IMAGENET):
        squares = []
        for image in decoded:
            scale = (spec.resize_to or spec.size) / min(image.size)
            width, height = int(image.width * scale), int(image.height * scale)
            left, top = round((width - spec.size) / 2), round((height - spec.size) / 2)
            resized = image.resize((width, height), FILTERS[spec.interpolation])
            square = resized.crop((left, top, left + spec.size, top + spec.size))
            squares.append(np.asarray(square).transpose(2, 0, 1))
        views.append(np.stack(squares))
    return views[0], views[1]


def _extract(program: str, video: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _ffmpeg(program, "-i", str(video), "-q:v", "2", str(folder / "image_%05d.jpg"))


def _ffmpeg(program: str, *words: str) -> None:
    subprocess.run([program, "-v", "error", "-nostdin", "-threads", "1", *words], check=True)
