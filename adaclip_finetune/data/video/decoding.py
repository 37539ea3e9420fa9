"""Decode a video in order, from its first frame to its last sound one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from numpy.typing import NDArray

from adaclip_finetune.data.video.container import BrokenVideo, opened, packets_of, reason_of

Frame = NDArray[np.uint8]
Stopped = Callable[[], bool]


def never() -> bool:
    """Return False: the default of `stopped` arguments."""
    return False


def sound_frames(path: Path, stopped: Stopped = never, num_packets: int | None = None) -> Iterator[Any]:
    """Decode every frame in order, up to a broken tail; of the first `num_packets` only, if that is given.

    Raises BrokenVideo for damage in the middle.
    """
    decoded, damaged_at, damage, goes_on = 0, 0, "", False
    with opened(path) as (container, stream):
        may_start_anywhere = container.format.name == "mpegts"  # recordings begin between key frames
        packets = packets_of(container, stream)
        for at, packet in enumerate(packets if num_packets is None else chain(islice(packets, num_packets), [None])):
            if stopped():
                return
            if at == 0:
                may_start_anywhere |= _starts_within_stream(stream, packet)
            if damage and (packet is None or not packet.size):
                break
            try:
                frames = stream.codec_context.decode(packet)
            except av.FFmpegError as error:
                if not damage:
                    damaged_at, damage = at, reason_of(error)
                continue
            goes_on = bool(damage) and (decoded > 0 or not may_start_anywhere)
            if goes_on:
                break
            damage = ""
            for frame in frames:
                if not frame.is_corrupt:
                    decoded += 1
                    yield frame
    if damage and num_packets is None:
        # A decoder that fails may have lost a sound frame that it held back, and would now return the damaged one.
        for frame in islice(sound_frames(path, stopped, damaged_at), decoded, None):
            decoded += 1
            yield frame
    if goes_on:
        raise BrokenVideo(f"the file is damaged after {decoded} sound frames ({damage})", "damaged")


def to_rgb(frame: Any) -> Frame:
    """Convert a decoded frame to RGB (H, W, 3), rotated and mirrored as the file's display matrix says."""
    pixels: Frame = frame.to_ndarray(format="rgb24", threads=1)
    # frame.side_data is kept by the frame and refers back to it, which holds the pixels until the garbage collection.
    matrix = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]  # its stub has no arguments
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    if abs(b) > abs(a):  # a quarter turn
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _starts_within_stream(stream: Any, first: Any) -> bool:
    """Return whether H.264 starts with a key frame that is no IDR picture, as after cutting open groups of pictures.

    What follows may refer to pictures before the cut, which the decoder calls an error although it needs none of them.
    """
    if stream.codec_context.codec.canonical_name != "h264":
        return False
    to_start_codes = av.BitStreamFilterContext("h264_mp4toannexb", stream)
    packets = b"".join(map(bytes, to_start_codes.filter(av.Packet(bytes(first)))))
    kinds = {unit[0] & 31 for unit in re.findall(rb"\x00\x00\x01(.)", packets, re.DOTALL)}  # ITU-T H.264, annex B
    return 1 in kinds and 5 not in kinds
