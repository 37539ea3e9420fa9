"""Read frames of one video file: frame n is the n-th that a player shows, whatever the container says.

`read_frames` decodes each wanted frame from the key frame before it, passing over frames that no other refers to, and
decodes from the start of the file where that does not give the frame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.video.container import BrokenVideo, opened, packets_of
from adaclip_finetune.data.video.decoding import Frame, Stopped, never, sound_frames, to_rgb
from adaclip_finetune.data.video.index import FrameIndex


def read_frames(path: Path, index: FrameIndex, indices: Sequence[int]) -> Frame | list[Frame]:
    """Return the frames with these indices, in any order and repeated at will: RGB (n, H, W, 3).

    Where frames differ in size, it is a list of arrays (H, W, 3). Raises BrokenVideo.
    """
    wanted = sorted(set(indices))
    if wanted[0] < 0 or wanted[-1] >= index.num_frames:
        raise IndexError(f"frames {wanted[0]} to {wanted[-1]} of {index.num_frames}")
    found = _read_by_seeking(path, index, wanted)
    found |= dict(_in_order(path, index, [i for i in wanted if i not in found]))
    frames = [found[i] for i in indices]
    return np.stack(frames) if len({frame.shape for frame in frames}) == 1 else frames


def scan_frames(path: Path, index: FrameIndex, stopped: Stopped = never) -> Iterator[tuple[int, Frame]]:
    """Give every frame with its index, in order, in one pass: RGB (H, W, 3), perhaps of several sizes.

    `stopped` is asked before each packet and ends the scan early. Raises BrokenVideo at the first frame that
    `read_frames` could not return either.
    """
    return _in_order(path, index, range(index.num_frames), stopped)


def _in_order(
    path: Path, index: FrameIndex, wanted: Sequence[int], stopped: Stopped = never
) -> Iterator[tuple[int, Frame]]:
    """Decode from the start and give the wanted frames (ascending); seek those that this does not give."""
    damage: list[str] = []
    waiting = deque(wanted)
    for i, frame in _in_one_pass(path, index, stopped, damage) if waiting else ():
        while waiting and waiting[0] < i:
            yield _seek(path, index, waiting.popleft(), damage)
        if waiting and waiting[0] == i:
            yield waiting.popleft(), to_rgb(frame)
        if not waiting:
            return
    for i in waiting:
        if stopped():
            return
        yield _seek(path, index, i, damage)


def _in_one_pass(path: Path, index: FrameIndex, stopped: Stopped, damage: list[str]) -> Iterator[tuple[int, Any]]:
    """Decode from the start and give frames with their indices; add to `damage` why that went no further."""
    place = _numbers(index, range(index.num_frames))
    try:
        for count, frame in enumerate(sound_frames(path, stopped)):
            i = count if place is None else place.get(frame.pts, -1)
            if 0 <= i < index.num_frames:
                yield i, frame
    except BrokenVideo as error:
        if error.kind != "damaged":
            raise
        damage.append(f": {error}")


def _seek(path: Path, index: FrameIndex, i: int, damage: list[str]) -> tuple[int, Frame]:
    """Return the index and pixels of a frame that decoding from the start did not give. Raises BrokenVideo."""
    found = _read_by_seeking(path, index, [i])
    if i not in found:
        reason = f"frame {i + 1} of {index.num_frames} cannot be decoded{''.join(damage)}"
        raise BrokenVideo(reason, "damaged")
    return i, found[i]


def _numbers(index: FrameIndex, frames: Sequence[int]) -> dict[int, int] | None:
    """Return pts → index of these frames; None where frames can only be counted."""
    if index.pts is None or index.position is None:
        return None
    return dict(zip(index.pts[frames].tolist(), frames, strict=True))


def _read_by_seeking(path: Path, index: FrameIndex, wanted: list[int]) -> dict[int, Frame]:
    """Decode from the nearest key frames. Damaged frames and frames that are not where they should be are left out."""
    found: dict[int, Frame] = {}
    pts, position = index.pts, index.position
    if pts is None or position is None:
        return found
    with opened(path) as (container, stream):
        for key, group in _by_key_frame(wanted, pts, position, index.keys):
            try:
                packets = _packets_from(container, stream, index.keys, key)
                last = int(pts[group[int(position[group].argmax())]])
                found |= _decode_group(stream.codec_context, packets, _numbers(index, group) or {}, last)
            except av.FFmpegError:  # decoding from the start will tell
                continue
    return found


def _by_key_frame(
    wanted: list[int], pts: NDArray[np.int64], position: NDArray[np.int64], keys: NDArray[np.int64]
) -> list[tuple[int, list[int]]]:
    """Group frames by the key frame (its row in `keys`) that decoding must start from."""
    groups: dict[int, list[int]] = {}
    for i in wanted:
        key = int(np.searchsorted(keys[:, 0], position[i], side="right")) - 1
        # A frame shown before the key frame that it follows in the file may refer to frames before that key frame.
        while key > 0 and keys[key, 1] > pts[i]:
            key -= 1
        groups.setdefault(max(key, 0), []).append(i)
    return sorted(groups.items())


def _packets_from(container: Any, stream: Any, keys: NDArray[np.int64], key: int) -> Iterator[Any]:
    """Read packets from key frame number `key` on, or from one before it if the container seeks no better."""
    place = {pts: i for i, pts in enumerate(keys[:, 1].tolist())}
    for target in keys[key, 1:].tolist():
        container.seek(target, stream=stream)
        packets = packets_of(container, stream)
        first = next((packet for packet in packets if packet.is_keyframe), None)
        if first is not None and place.get(first.pts, len(keys)) <= key:
            yield first
            # What is shown before it refers to frames that were passed over.
            yield from (packet for packet in packets if packet.pts is None or packet.pts > first.pts)
            return


def _decode_group(context: Any, packets: Iterator[Any], wanted: dict[int, int], last: int) -> dict[int, Frame]:
    """Decode until the packet with pts `last`; return the frames whose pts are in `wanted` (pts → index)."""
    found: dict[int, Frame] = {}

    def keep(frames: list[Any]) -> None:
        for frame in frames:
            if frame.pts in wanted and not frame.is_corrupt:
                found[wanted[frame.pts]] = to_rgb(frame)

    for packet in packets:
        context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        keep(context.decode(packet))
        if packet.pts == last:
            break
    keep(context.decode(None))
    return found
