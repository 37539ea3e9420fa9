"""Open a video file with PyAV: plain containers only, and only from disk.

FFmpeg would follow a playlist or script that is called .mp4 to other files and addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import av

CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,gif,dv,rm,mxf,mjpeg,yuv4mpegpipe,"
    "h264,hevc,m4v,obu,ivf,nut"
)


class BrokenVideo(Exception):
    """A file that cannot give the frames asked for. The message is the reason, without the file's name."""

    def __init__(self, reason: str, kind: Literal["damaged", "unreadable"] = "unreadable") -> None:
        super().__init__(reason)
        self.kind = kind


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
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise BrokenVideo("it holds no video stream" + ("" if stream is None else ", only a cover picture"))
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = reason_of(error)
        if isinstance(error, av.InvalidDataError | av.EOFError):
            empty = path.stat().st_size == 0
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
