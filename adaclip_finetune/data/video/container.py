"""A video's container, opened by PyAV: plain ones only, and only from disk. A playlist or script that calls itself .mp4
cannot make us open anything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import av

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf"
READ_ERRORS = (av.FFmpegError, OSError, ValueError)  # what PyAV raises for files that are not what they should be


class BrokenVideo(Exception):
    """The file cannot give what was asked of it; the message is the reason, without the file's name."""

    def __init__(self, reason: str, kind: Literal["sizes", "damaged", "unreadable"] = "unreadable") -> None:
        super().__init__(reason, kind)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream.

    One thread, because many workers read at once. The decoder reports damage instead of painting over it, so that a
    file which went bad does not quietly become other training data.
    """
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        found = av.open(f"file:{path}", container_options=options, metadata_errors="replace")
    except (av.InvalidDataError, av.EOFError) as error:
        what = f"it is no video of a known kind, or was cut off ({reason_of(error)})"
        raise BrokenVideo(what if path.stat().st_size else "the file is empty") from None
    with found as container:
        stream = container.streams.best("video")
        if stream is None:
            raise BrokenVideo("it holds no video stream")
        if stream.disposition & av.stream.Disposition.attached_pic:
            raise BrokenVideo("it holds no video stream, only a cover picture")
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"err_detect": "explode"}
        yield container, stream


def packets_of(container: Any, stream: Any) -> Iterator[Any]:
    """Those that hold something."""
    return (packet for packet in container.demux(stream) if packet.size)


def reason_of(error: Exception) -> str:
    """In words, without the file's name."""
    return getattr(error, "strerror", None) or str(error)
