"""One video file, read in place by PyAV: frame n is the n-th frame in presentation order, whatever the container says.

`index_video` (index.py) counts and locates the frames. `read_frames` then seeks each wanted frame
(seeking.py), and falls back on decoding from the start (decoding.py) where that does not give it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaclip_finetune.data.video.container import READ_ERRORS, BrokenVideo, reason_of
from adaclip_finetune.data.video.decoding import Frame, Stopped, never, sound_frames, to_rgb
from adaclip_finetune.data.video.index import VideoIndex
from adaclip_finetune.data.video.seeking import read_by_seeking


def read_frames(path: Path, index: VideoIndex, indices: Sequence[int]) -> Frame:
    """The frames with these indices (any order, repeats allowed) → RGB (n, H, W, 3), upright. Raises BrokenVideo."""
    wanted = sorted(set(indices))
    if wanted[0] < 0 or wanted[-1] >= index.num_frames:
        raise IndexError(f"frames {wanted[0]} to {wanted[-1]} of {index.num_frames}")
    try:
        found = read_by_seeking(path, index, wanted)
        if len(found) < len(wanted):
            found |= _read_from_start(path, index, [i for i in wanted if i not in found])
    except READ_ERRORS as error:
        raise BrokenVideo(reason_of(error)) from None
    if len({frame.shape for frame in found.values()}) > 1:
        raise BrokenVideo("its frames differ in size", "sizes")
    return np.stack([found[i] for i in indices])


def scan_frames(path: Path, index: VideoIndex, stopped: Stopped = never) -> Iterator[tuple[int, Frame]]:
    """Every frame with its index, in order, in one pass: RGB (H, W, 3), upright. They may differ in size.

    It ends early when `stopped`, which is asked before each packet, says so. Raises BrokenVideo at the first frame
    that `read_frames` could not give either.
    """
    damage: list[str] = []
    ahead = 0
    try:
        for i, frame in _in_one_pass(path, index, stopped, damage):
            for passed_over in range(ahead, i):
                yield passed_over, _seek(path, index, passed_over, damage)
            yield i, to_rgb(frame)
            ahead = i + 1
        for left in range(ahead, index.num_frames):
            if stopped():
                return
            yield left, _seek(path, index, left, damage)
    except READ_ERRORS as error:
        raise BrokenVideo(reason_of(error)) from None


def _read_from_start(path: Path, index: VideoIndex, wanted: list[int]) -> dict[int, Frame]:
    """The slow way, which needs nothing but a decoder. Raises BrokenVideo."""
    place = None if index.pts is None else {int(index.pts[i]): i for i in wanted}
    found: dict[int, Frame] = {}
    damage = ""
    try:
        for count, frame in enumerate(sound_frames(path)):
            i = count if place is None else place.get(frame.pts)
            if i in wanted:
                found[i] = to_rgb(frame)
                if len(found) == len(wanted):
                    return found
    except BrokenVideo as error:
        damage = f": {error}"
    raise _undecodable(next(i for i in wanted if i not in found), index, damage)


def _in_one_pass(path: Path, index: VideoIndex, stopped: Stopped, damage: list[str]) -> Iterator[tuple[int, Any]]:
    """What decoding from the start gives, with its index; into `damage` goes why it went no further."""
    place = None if index.pts is None else {int(pts): i for i, pts in enumerate(index.pts)}
    ahead = 0
    try:
        for count, frame in enumerate(sound_frames(path, stopped)):
            i = count if place is None else place.get(frame.pts, -1)
            if ahead <= i < index.num_frames:
                yield i, frame
                ahead = i + 1
    except BrokenVideo as error:
        damage.append(f": {error}")


def _seek(path: Path, index: VideoIndex, i: int, damage: list[str]) -> Frame:
    """One frame that decoding from the start did not give. Raises BrokenVideo."""
    found = read_by_seeking(path, index, [i])
    if i not in found:
        raise _undecodable(i, index, "".join(damage))
    return found[i]


def _undecodable(i: int, index: VideoIndex, why: str) -> BrokenVideo:
    return BrokenVideo(f"frame {i + 1} of {index.num_frames} cannot be decoded{why}", "damaged")
