"""What a video file says about itself, and where the frames of a clip are in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.video.container import CONTAINERS, READ_ERRORS
from adaclip_finetune.data.video.index import TIMED_CONTAINERS, VideoIndex
from adaclip_finetune.extract.program import Failed


@dataclass(frozen=True)
class Facts:
    """Seconds, frames a second; None where the file does not tell.

    indexable: data/video/file.py opens its kind. seeks: the container knows where its frames are.
    """

    stream: int | None
    fps: float | None = None
    duration: float | None = None
    indexable: bool = False
    seeks: bool = True
    tick: float = 0.0  # seconds, of the times in a VideoIndex
    begins: float = 0.0  # the time from which start and end of a clip count


def probe(source: Path) -> Facts:
    """Open the file without decoding. What does not open has no facts: ffmpeg will say why. Raises Failed."""
    try:
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        with av.open(f"file:{source}", container_options=options, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None:
                raise Failed("it holds no video stream")
            if stream.disposition & av.stream.Disposition.attached_pic:
                raise Failed("it holds no video stream, only a cover picture")
            kind = container.format.name.partition(",")[0]
            return Facts(
                stream.index,
                float(stream.average_rate) if stream.average_rate else None,
                container.duration / av.time_base if container.duration else None,
                kind in CONTAINERS.split(","),
                kind in (*TIMED_CONTAINERS, "asf"),
                float(stream.time_base or 0),
                (container.start_time or 0) / av.time_base,
            )
    except READ_ERRORS:
        return Facts(None)


def frames_between(index: VideoIndex, facts: Facts, start: float | None, end: float | None) -> NDArray[np.int64] | None:
    """Indices of the frames that are shown at start ≤ t < end. None where the file does not tell their times."""
    if start is None and end is None:
        return np.arange(index.num_frames)
    if index.pts is None:
        return None
    times: NDArray[Any] = np.round(index.pts * facts.tick - facts.begins, 6)  # ffmpeg counts in microseconds
    return np.flatnonzero((times >= (start or 0.0)) & (times < (np.inf if end is None else end)))
