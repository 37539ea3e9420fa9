"""Pass on a video that is in object storage to a browser, which asks for ranges of it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from starlette.responses import Response, StreamingResponse

from adaclip_finetune.data.video.remote import RemotePath

_CHUNK = 2**20  # bytes


def stream_range(path: RemotePath, asked: str | None, media_type: str | None) -> Response:
    """Return the range of a file that a Range header asks for (RFC 9110, 14.2), or the whole file. Raise OSError.

    Several ranges in one request, which players do not send, get the whole file.
    """
    size = path.stat().st_size
    start, end, headers = 0, size, {"accept-ranges": "bytes"}
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", asked or "", re.ASCII)
    is_part = found is not None and bool(found[1] or found[2])
    if found is not None and is_part:
        if found[1]:
            start, end = int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)
        else:
            start = max(0, size - int(found[2]))
        if start >= end:
            return Response(status_code=416, headers=headers | {"content-range": f"bytes */{size}"})
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"

    def chunks() -> Iterator[bytes]:
        for at in range(start, end, _CHUNK):
            yield path.read_range(at, min(at + _CHUNK, end))

    headers["content-length"] = str(end - start)
    return StreamingResponse(chunks(), 206 if is_part else 200, headers, media_type or "application/octet-stream")
