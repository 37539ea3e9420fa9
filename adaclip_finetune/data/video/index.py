"""Where the frames of a video are: counted and located by walking over the packets, without decoding; by decoding where
a file's packets do not tell its frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.video.container import READ_ERRORS, BrokenVideo, opened, packets_of, reason_of
from adaclip_finetune.data.video.decoding import sound_frames

# Where packets are frames: containers that keep both times of every packet, codecs that put one frame into each.
TIMED_CONTAINERS = ("mov", "matroska", "flv")
# Whose packets say when frames are shown; of others FFmpeg gives what it guessed by the order in the file.
SHOWN_IN = (*TIMED_CONTAINERS, "mpegts", "mpeg", "asf")
ONE_FRAME_A_PACKET = ("h264", "hevc", "av1", "vp9", "mpeg2video", "mjpeg")


@dataclass(frozen=True)
class VideoIndex:
    """Where the frames are. Where the packets do not tell, `pts` is None: frames are counted from the start, and
    `shown` says when a player shows them, if the file does: in units of the stream, and no guide for seeking."""

    num_frames: int
    pts: NDArray[np.int64] | None = None  # (num_frames,), ascending
    position: NDArray[np.int64] | None = None  # (num_frames,), place in decoding order
    keys: tuple[KeyFrame, ...] = ()  # in decoding order
    shown: NDArray[np.int64] | None = None  # (num_frames,), ascending


@dataclass(frozen=True)
class KeyFrame:
    """A packet where decoding can start; times in units of the stream."""

    position: int
    pts: int
    dts: int


def index_video(path: Path) -> VideoIndex:
    """Count and locate the frames of a video that has at least one. Raises BrokenVideo."""
    try:
        index = _index_by_packets(path) or _index_by_decoding(path)
    except READ_ERRORS as error:
        raise BrokenVideo(reason_of(error)) from None
    if index.num_frames == 0:
        raise BrokenVideo("it holds no video frame")
    return index


def _index_by_packets(path: Path) -> VideoIndex | None:
    """None where packets and frames do not match one to one, or have no times."""
    pts: list[int] = []
    position: list[int] = []
    keys: list[KeyFrame] = []
    with opened(path) as (container, stream):
        container_name = container.format.name.partition(",")[0]
        codec = stream.codec_context.codec.canonical_name
        if container_name not in TIMED_CONTAINERS or codec not in ONE_FRAME_A_PACKET:
            return None
        for at, packet in enumerate(packets_of(container, stream)):
            if packet.pts is None:
                return None
            if packet.is_keyframe:
                keys.append(KeyFrame(at, packet.pts, packet.pts if packet.dts is None else packet.dts))
            if not packet.is_discard and not packet.is_corrupt:  # outside the edit list; cut off by the end of the file
                pts.append(packet.pts)
                position.append(at)
    times = np.array(pts, np.int64)
    order = np.argsort(times, kind="stable")
    times = times[order]
    if len(times) and ((np.diff(times) == 0).any() or not keys or _first_pts(path) != times[0]):
        return None
    return VideoIndex(len(times), times, np.array(position, np.int64)[order], tuple(keys))


def _index_by_decoding(path: Path) -> VideoIndex:
    with opened(path) as (container, _):
        tells = container.format.name.partition(",")[0] in SHOWN_IN
    shown: list[int | None] = [frame.pts for frame in sound_frames(path)]
    if not tells or None in shown:
        return VideoIndex(len(shown))
    times = np.array(shown, np.int64)
    return VideoIndex(len(times), shown=times if (np.diff(times) > 0).all() else None)


def _first_pts(path: Path) -> int | None:
    """A stream that starts in the middle loses its first frames: then packets are no guide."""
    return next((frame.pts for frame in sound_frames(path)), None)
