"""Extracted frames: a folder of numbered images for each video."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.frame_store import FrameError, place_and_stamp, unlisted
from adaclip_finetune.data.images import ImageStore
from adaclip_finetune.data.names import FolderNames, split_extension

FRAME_TIMES = "frame_times.json"  # seconds, one an image: when it is shown in the video


class FrameFolder(ImageStore):
    """A frame store for `folder/<video>/image_00001.jpg …`, numbered from 1 without gaps.

    `img_tmpl` is the name of an image with one place for its number, such as `image_{:05d}.jpg`.
    """

    def __init__(self, folder: Path, img_tmpl: str) -> None:
        self.folder = folder
        self.img_tmpl = img_tmpl
        self._pattern = _name_pattern(img_tmpl)
        self._names = FolderNames()
        self._counts: dict[str, int] = {}

    def count(self, video_id: str) -> int:
        if video_id not in self._counts:
            self._counts[video_id] = self._count(video_id)
        return self._counts[video_id]

    def times(self, video_id: str) -> NDArray[np.float64] | None:
        """Return when each frame is shown, as `adaclip extract` wrote it beside the images; None if it did not."""
        path = self.video_folder(video_id) / FRAME_TIMES
        try:
            times = np.array(json.loads(path.read_bytes()), np.float64)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise FrameError(video_id, path, f"cannot be read ({error}): extract again, or delete it") from None
        if times.shape != (self.count(video_id),) or not (np.diff(times) > 0).all():
            raise FrameError(video_id, path, "does not hold one time for each image: extract again, or delete it")
        return times

    def stamp(self, video_id: str) -> str:
        return place_and_stamp(video_id, self.video_folder(video_id))

    def video_folder(self, video_id: str) -> Path:
        """Return the folder of a video's images, whatever Unicode form its name has.

        The frames of "clip.mp4" are in the folder "clip.mp4" if it exists, else in "clip". Raises FrameError if two
        folders differ in nothing but the Unicode form of their names.
        """
        folder = self._names.find(self.folder, video_id)
        stem, extension = split_extension(video_id)
        if extension is None or _is_folder(folder):
            return folder
        without = self._names.find(self.folder, stem)
        return without if _is_folder(without) else folder

    def number(self, name: str) -> int | None:
        """Return the number of the image that has this file name; None if `img_tmpl` gives no image this name."""
        found = self._pattern.fullmatch(name)
        return int(found[1]) if found and self.img_tmpl.format(int(found[1])) == name else None

    def path(self, video_id: str, index: int) -> Path:
        """Return the file of the frame with this index, which counts from 0."""
        return self.video_folder(video_id) / self.img_tmpl.format(index + 1)

    def _count(self, video_id: str) -> int:
        folder = self.video_folder(video_id)
        try:
            with os.scandir(folder) as entries:
                numbers = {found for entry in entries if (found := self.number(entry.name)) is not None}
        except OSError as error:
            raise unlisted(video_id, folder, error) from None
        if not numbers:
            raise FrameError(video_id, folder, f"holds no file named like {self.img_tmpl.format(1)}")
        if 0 in numbers:
            raise FrameError(video_id, folder, f"{self.img_tmpl.format(0)} is there, but images are numbered from 1")
        if (greatest := max(numbers)) > len(numbers):  # it may be a time in seconds, too large to count up to
            gap = next(number for number in count(1) if number not in numbers)
            first, last = self.img_tmpl.format(gap), self.img_tmpl.format(greatest)
            raise FrameError(video_id, folder, f"{first} is missing, though {last} is there", "gap")
        return len(numbers)

    def _images(self, video_id: str, indices: Sequence[int]) -> Iterator[tuple[Path, str, Path]]:
        for index in indices:
            path = self.path(video_id, index)
            yield path, "", path


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # such as a name that is too long: listing the folder will tell the reason
        return False


def _name_pattern(img_tmpl: str) -> re.Pattern[str]:
    """Return a pattern of the file names that a template such as `image_{:05d}.jpg` gives; group 1 is the number."""
    before, _, rest = img_tmpl.partition("{")
    return re.compile(re.escape(before) + r"(\d+)" + re.escape(rest.partition("}")[2]), re.ASCII)
