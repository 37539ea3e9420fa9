"""Read frames of one video file: frame n is the n-th that a player shows, whatever the container says.

`read_frames` decodes each wanted frame from the key frame before it, passing over frames that no other refers to, and
decodes from the start of the file where that does not give the frame. `stream_frames` gives many frames in one pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import av
import numpy as np

from adaclip_finetune.data.video.decoding import (
    BrokenVideo,
    Frame,
    Source,
    Stopped,
    never,
    opened,
    packets_of,
    sound_frames,
    to_rgb,
)
from adaclip_finetune.data.video.index import FrameIndex


def read_frames(source: Source, index: FrameIndex, indices: Sequence[int]) -> Frame | list[Frame]:
    """Return the frames with these indices, in any order and repeated at will: RGB (n, H, W, 3).

    Where frames differ in size, it is a list of arrays (H, W, 3). Raises BrokenVideo.
    """
    wanted = sorted(set(indices))
    if wanted[0] < 0 or wanted[-1] >= index.num_frames:
        raise IndexError(f"frames {wanted[0]} to {wanted[-1]} of {index.num_frames}")
    found = {number: frame for part in _by_seeking(source, index, wanted) for number, frame in part.items()}
    if rest := [i for i in wanted if i not in found]:
        found |= dict(_in_order(source, index, rest, never))
    frames = [found[i] for i in indices]
    return np.stack(frames) if len({frame.shape for frame in frames}) == 1 else frames


def stream_frames(source: Source, index: FrameIndex, wanted: Sequence[int]) -> Iterator[tuple[int, Frame]]:
    """Give the wanted frames (ascending, each once) with their indices, in one pass that passes over the others.

    RGB (H, W, 3), perhaps of several sizes; those between two key frames are in memory together. Raises BrokenVideo.
    """
    done = 0
    for part in _by_seeking(source, index, wanted):
        if sorted(part) != list(wanted[done : done + len(part)]):
            break
        yield from sorted(part.items())
        done += len(part)
    if done < len(wanted):
        yield from _in_order(source, index, wanted[done:], never)


def scan_frames(source: Source, index: FrameIndex, stopped: Stopped = never) -> Iterator[tuple[int, Frame]]:
    """Give every frame with its index, in order, in one pass: RGB (H, W, 3), perhaps of several sizes.

    `stopped` is asked before each packet and ends the scan early. Raises BrokenVideo at the first damaged frame.
    """
    return _in_order(source, index, range(index.num_frames), stopped)


def _in_order(
    source: Source, index: FrameIndex, wanted: Sequence[int], stopped: Stopped
) -> Iterator[tuple[int, Frame]]:
    """Decode from the start and give the wanted frames (ascending). Raises BrokenVideo if one is not there."""
    waiting, damage = deque(wanted), ""
    number = _numbers(index, range(index.num_frames)) if index.keys is not None else None
    try:
        for count, frame in enumerate(sound_frames(source, stopped)):
            i = count if number is None else number.get(frame.pts, -1)
            if i > waiting[0]:
                break
            if i == waiting[0]:
                yield waiting.popleft(), to_rgb(frame)
            if not waiting:
                return
    except BrokenVideo as error:
        if error.kind != "damaged":
            raise
        damage = f": {error}"
    if not stopped():
        raise BrokenVideo(f"frame {waiting[0] + 1} of {index.num_frames} cannot be decoded{damage}", "damaged")


def _by_seeking(source: Source, index: FrameIndex, wanted: Sequence[int]) -> Iterator[dict[int, Frame]]:
    """Decode from each key frame what is wanted before the next, in order.

    Damaged frames, and all that the container does not seek to, are left out.
    """
    if index.keys is None:
        return
    number = _numbers(index, wanted)
    by_key: dict[int, set[int]] = {}
    for pts in number:
        by_key.setdefault(int(np.searchsorted(index.keys, pts, side="right")) - 1, set()).add(pts)
    with opened(source) as (container, stream):
        for key, group in sorted(by_key.items()):
            found: dict[int, Frame] = {}
            with suppress(av.FFmpegError):  # decoding from the start will tell
                for frame in _decoded_from(container, stream, index.keys[max(key - 1, 0) : key + 1].tolist(), group):
                    if frame.pts in group and not frame.is_corrupt:
                        found[number[frame.pts]] = to_rgb(frame)
            yield found


def _numbers(index: FrameIndex, frames: Sequence[int]) -> dict[int, int]:
    """Return pts → index of these frames."""
    assert index.pts is not None, "an index with key frames has times"
    return dict(zip(index.pts[frames].tolist(), frames, strict=True))


def _decoded_from(container: Any, stream: Any, keys: list[int], wanted: set[int]) -> Iterator[Any]:
    """Decode from the last of the key frames on, or from an earlier one if the container seeks no better.

    All numbers are pts. End when the packets with the pts in `wanted` are decoded.
    """
    context, missing = stream.codec_context, set(wanted)
    for target in reversed(keys):
        container.seek(target, stream=stream)
        packets = packets_of(container, stream)
        first = next((packet for packet in packets if packet.is_keyframe), None)
        if first is None or first.pts > keys[-1]:
            continue
        for packet in chain([first], packets):
            if packet.pts is None or packet.pts < first.pts:  # shown before `first`: may refer to frames before it
                continue
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from context.decode(packet)
            missing.discard(packet.pts)
            if not missing:
                break
        yield from context.decode(None)
        return
