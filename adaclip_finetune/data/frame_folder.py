"""Frames that were extracted: a folder of images a video."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.frame_store import FrameError, Kind, Scan, unlisted
from adaclip_finetune.data.images import decoded, one_by_one, stacked
from adaclip_finetune.data.video.decoding import Stopped, never


class FrameFolder:
    """`folder/<video>/image_00001.jpg …`, numbered from 1 without gaps."""

    def __init__(self, folder: Path, img_tmpl: str) -> None:
        """img_tmpl: the file name with one place for the number, such as `image_{:05d}.jpg` (the config checks it)."""
        self.folder = folder
        self.img_tmpl = img_tmpl
        self._name = _name_pattern(img_tmpl)
        self._counts: dict[str, int] = {}

    def count(self, video_id: str) -> int:
        if video_id not in self._counts:
            self._counts[video_id] = self._count(video_id)
        return self._counts[video_id]

    def read(self, video_id: str, indices: Sequence[int]) -> NDArray[np.uint8]:
        images = {i: self._image(video_id, i) for i in sorted(set(indices))}
        return stacked(images, indices, video_id, self.folder / video_id)

    def scan(self, video_id: str, stopped: Stopped = never) -> Scan:
        return one_by_one(self, video_id, stopped)

    def numbers(self, video_id: str) -> set[int]:
        """The numbers of the images in the video's folder. Raises FrameError if it cannot be listed."""
        folder = self.folder / video_id
        numbers = set()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    number = self.number(entry.name)
                    if number is not None:
                        numbers.add(number)
        except OSError as error:
            raise unlisted(video_id, folder, error) from None
        return numbers

    def number(self, name: str) -> int | None:
        """Of the image that is called so; None for what is called otherwise."""
        found = self._name.fullmatch(name)
        return int(found[1]) if found and self.img_tmpl.format(int(found[1])) == name else None

    def path(self, video_id: str, index: int) -> Path:
        """The file of a frame."""
        return self.folder / video_id / self.img_tmpl.format(index + 1)

    def _count(self, video_id: str) -> int:
        folder, numbers = self.folder / video_id, self.numbers(video_id)
        if not numbers:
            raise FrameError(video_id, folder, f"holds no file named like {self.img_tmpl.format(1)}")
        if 0 in numbers:
            raise FrameError(video_id, folder, f"{self.img_tmpl.format(0)} is there, but images are numbered from 1")
        if (greatest := max(numbers)) > len(numbers):  # it may be a time, and too large to count up to
            gap = next(number for number in count(1) if number not in numbers)
            first, last = self.img_tmpl.format(gap), self.img_tmpl.format(greatest)
            raise FrameError(video_id, folder, f"{first} is missing, though {last} is there", "gap")
        return len(numbers)

    def _image(self, video_id: str, index: int) -> NDArray[np.uint8]:
        path = self.path(video_id, index)
        try:
            return decoded(path)
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            # What the system refuses is no damage.
            kind: Kind = "unreadable" if isinstance(error, OSError) and error.errno else "damaged"
            raise FrameError(video_id, path, f"cannot be decoded ({error})", kind) from None


def _name_pattern(img_tmpl: str) -> re.Pattern[str]:
    """What file names a template such as `image_{:05d}.jpg` gives; group 1 is the number."""
    before, _, rest = img_tmpl.partition("{")
    return re.compile(re.escape(before) + r"(\d+)" + re.escape(rest.partition("}")[2]), re.ASCII)
