"""When a player shows the frames of a video file: by its presentation times, which variable rates need, else by its
rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av

from adaclip_finetune.data.video.container import CONTAINERS, READ_ERRORS, BrokenVideo
from adaclip_finetune.data.video.index import VideoIndex


class Times(NamedTuple):
    """Seconds: how long a video is, and when frames of it are shown. None: not known. Each is measured where the file
    says so, else reckoned from its rate as if frames were evenly spaced."""

    length: float | None
    shown: list[float | None]
    length_measured: bool
    shown_measured: bool


def video_times(path: Path, index: VideoIndex, frames: Sequence[int]) -> Times:
    """Of the frames with these indices. Raises BrokenVideo."""
    try:
        clock = _clock(path)
    except READ_ERRORS as error:
        raise BrokenVideo(getattr(error, "strerror", None) or str(error)) from None
    length, spacing = clock.duration, None if clock.rate is None else 1 / clock.rate
    pts = index.shown if index.pts is None else index.pts
    if pts is None or clock.tick is None:
        evenly = [None if spacing is None else _milliseconds(frame * spacing) for frame in [*frames, index.num_frames]]
        return Times(evenly[-1] if length is None else length, evenly[:-1], length is not None, False)
    *shown, last = [_milliseconds(int(time) * clock.tick - clock.begins) for time in pts[[*frames, -1]]]
    if length is None:
        length = round(last + (spacing or 0.0), 3)
    # Writers reckon a length by when frames are decoded, which is before they are shown.
    return Times(max(length, last), list(shown), True, True)


class _Clock(NamedTuple):
    tick: float | None  # seconds that a pts of 1 stands for
    begins: float  # where a player's clock is 0: sound may begin before the picture
    rate: float | None  # frames a second
    duration: float | None  # seconds


def _clock(path: Path) -> _Clock:
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    with av.open(f"file:{path}", container_options=options, metadata_errors="replace") as container:
        stream: Any = container.streams.best("video")
        return _Clock(
            float(stream.time_base) if stream.time_base else None,
            (container.start_time or 0) / av.time_base,
            float(stream.average_rate) if stream.average_rate else None,
            round(container.duration / av.time_base, 3) if container.duration else None,
        )


def _milliseconds(seconds: float) -> float:
    """Rounded up: a moment earlier, a player would show the frame before."""
    return math.ceil(seconds * 1000 - 1e-3) / 1000
