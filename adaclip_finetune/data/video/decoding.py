"""Decode a video in order, from its first frame to its last sound one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from numpy.typing import NDArray

from adaclip_finetune.data.video.container import BrokenVideo, opened, reason_of

Frame = NDArray[np.uint8]
Stopped = Callable[[], bool]


def never() -> bool:
    """Return False: the default of `stopped` arguments."""
    return False


def sound_frames(path: Path, stopped: Stopped = never) -> Iterator[Any]:
    """Decode every frame in order, up to a broken tail. Raises BrokenVideo for damage in the middle."""
    decoded, damaged_at, damage, goes_on = 0, -1, "", False
    with opened(path) as (container, stream):
        may_start_anywhere = container.format.name == "mpegts"  # recordings begin between key frames
        for at, packet in enumerate(container.demux(stream)):
            if stopped():
                return
            if at == 0:
                may_start_anywhere |= _starts_within_stream(stream.codec_context, bytes(packet))
            if damage and not packet.size:
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
            for frame in _whole(frames):
                decoded += 1
                yield frame
    if damage:
        # A decoder that fails may have lost a sound frame that it held back, and would now return the damaged one.
        for frame in islice(_frames_of_first_packets(path, damaged_at, stopped), decoded, None):
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


def _starts_within_stream(context: Any, first: bytes) -> bool:
    """Return whether H.264 starts with a key frame that is no IDR picture, as after cutting open groups of pictures.

    What follows may refer to pictures before the cut, which the decoder calls an error although it needs none of them.
    """
    if context.codec.canonical_name != "h264":
        return False
    header = context.extradata or b""
    if len(header) < 5 or header[0] != 1:  # units behind start codes: ITU-T H.264, annex B
        kinds = {unit[0] & 31 for unit in re.findall(rb"\x00\x00\x01(.)", first, re.DOTALL)}
    else:  # units behind their lengths: ISO/IEC 14496-15, 5.3.3
        kinds, at, bytes_of_length = set(), 0, (header[4] & 3) + 1
        while at + bytes_of_length < len(first):
            kinds.add(first[at + bytes_of_length] & 31)
            at += bytes_of_length + int.from_bytes(first[at : at + bytes_of_length], "big")
    return 1 in kinds and 5 not in kinds


def _frames_of_first_packets(path: Path, num_packets: int, stopped: Stopped) -> Iterator[Any]:
    """Decode the first packets of a file, which are known to be sound, and flush the decoder."""
    with opened(path) as (container, stream), suppress(av.FFmpegError):  # damage may show a packet late
        for packet in islice(container.demux(stream), num_packets):
            if stopped():
                return
            yield from _whole(stream.codec_context.decode(packet))
        yield from _whole(stream.codec_context.decode(None))


def _whole(frames: list[Any]) -> list[Any]:
    return [frame for frame in frames if not frame.is_corrupt]
