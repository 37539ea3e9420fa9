"""Open a video with PyAV, and decode it in order, from its first frame to its last sound one.

Only plain containers are opened, from disk or through fsspec: FFmpeg would follow a playlist or script that is called
.mp4 to other files and addresses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from numpy.typing import NDArray

from adaclip_finetune.data.video.remote import RemotePath

CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,gif,dv,rm,mxf,mjpeg,yuv4mpegpipe,"
    "h264,hevc,m4v,obu,ivf,nut"
)

Frame = NDArray[np.uint8]
Stopped = Callable[[], bool]


@dataclass(frozen=True)
class Member:
    """A video inside another file, such as a tar file: the `size` bytes from `start` on."""

    path: Path
    start: int
    size: int


Source = Path | RemotePath | Member


class BrokenVideo(Exception):
    """A file that cannot give the frames asked for. The message is the reason, without the file's name."""

    def __init__(self, reason: str, kind: Literal["damaged", "unreadable"] = "unreadable") -> None:
        super().__init__(reason)
        self.kind = kind


@contextmanager
def opened(source: Source) -> Iterator[tuple[Any, Any]]:
    """Open a file and give its container and video stream. Errors of FFmpeg in the body become BrokenVideo.

    The decoder has one thread, because many workers read at once, and it reports damage instead of concealing it, so
    that a damaged file does not silently become other training data.
    """
    url: Any = f"file:{source}"
    protocols = "file"
    if isinstance(source, Member):  # FFmpeg reads these bytes alone, without a call into Python
        if not source.size:
            raise BrokenVideo("the file is empty")
        end = source.start + source.size
        url, protocols = f"subfile,,start,{source.start},end,{end},,:file:{source.path}", "file,subfile"
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": protocols}
    try:
        if isinstance(source, RemotePath):
            url, options["protocol_whitelist"] = source.open(), "none"
        with av.open(url, container_options=options, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise BrokenVideo("it holds no video stream" + ("" if stream is None else ", only a cover picture"))
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = reason_of(error)
        if isinstance(error, av.InvalidDataError | av.EOFError):
            empty = not isinstance(source, Member) and source.stat().st_size == 0
            reason = "the file is empty" if empty else f"it is no video of a known kind, or was cut off ({reason})"
        raise BrokenVideo(reason) from None


def packets_of(container: Any, stream: Any) -> Iterator[Any]:
    """Read the stream's packets, and at the end an empty one that makes the decoder give what it has held back."""
    # PyAV frees its buffer only if this generator is closed before the container.
    with closing(container.demux(stream)) as packets:
        yield from packets


def reason_of(error: Exception) -> str:
    """Return what FFmpeg or the system says of an error, without the file's name."""
    return getattr(error, "strerror", None) or str(error)


def never() -> bool:
    """Return False: the default of `stopped` arguments."""
    return False


def sound_frames(source: Source, stopped: Stopped = never, num_packets: int | None = None) -> Iterator[Any]:
    """Decode every frame in order, up to a broken tail; of the first `num_packets` only, if that is given.

    Raises BrokenVideo for damage in the middle.
    """
    decoded, damaged_at, damage, goes_on = 0, 0, "", False
    with opened(source) as (container, stream):
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
        for frame in islice(sound_frames(source, stopped, damaged_at), decoded, None):
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
