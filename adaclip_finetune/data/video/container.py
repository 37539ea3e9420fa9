"""Open a video file with PyAV: plain containers only, and only from disk.

FFmpeg would follow a playlist or script that is called .mp4 to other files and addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import av

CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,gif,dv,rm,mxf,mjpeg,yuv4mpegpipe,"
    "h264,hevc,m4v,obu,ivf,nut"
)
READ_ERRORS = (av.FFmpegError, OSError, ValueError)  # what PyAV raises for files that are not as they should be


class BrokenVideo(Exception):
    """A file that cannot give the frames asked for. The message is the reason, without the file's name."""

    def __init__(self, reason: str, kind: Literal["damaged", "unreadable"] = "unreadable") -> None:
        super().__init__(reason, kind)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file and give its container and video stream. Errors of FFmpeg in the body become BrokenVideo.

    The decoder has one thread, because many workers read at once, and it reports damage instead of concealing it, so
    that a damaged file does not silently become other training data.
    """
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(f"file:{path}", container_options=options, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None:
                raise BrokenVideo("it holds no video stream")
            if stream.disposition & av.stream.Disposition.attached_pic:
                raise BrokenVideo("it holds no video stream, only a cover picture")
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except READ_ERRORS as error:
        reason = reason_of(error)
        if isinstance(error, av.InvalidDataError | av.EOFError):
            empty = path.stat().st_size == 0
            reason = "the file is empty" if empty else f"it is no video of a known kind, or was cut off ({reason})"
        raise BrokenVideo(reason) from None


def packets_of(container: Any, stream: Any) -> Iterator[Any]:
    """Read the stream's packets, without the empty one at the end."""
    return (packet for packet in container.demux(stream) if packet.size)


def reason_of(error: Exception) -> str:
    """Return what FFmpeg or the system says of an error, without the file's name."""
    return getattr(error, "strerror", None) or str(error)
