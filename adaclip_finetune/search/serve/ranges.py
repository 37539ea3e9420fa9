"""An open file as an HTTP answer, whole or the part that was asked for (RFC 9110, section 14)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from starlette.responses import JSONResponse, Response, StreamingResponse

_CHUNK = 256 * 1024  # bytes


class Span(NamedTuple):
    """Bytes from `start` on, before `end`."""

    start: int
    end: int


class Unsatisfiable(Exception):
    """The file has no such part."""


def file_response(file: BinaryIO, media_type: str, wanted: str | None, if_range: str | None) -> Response:
    """200, 206 or 416. `wanted` and `if_range` are the headers Range and If-Range. Closes the file when it is sent."""
    found = os.fstat(file.fileno())
    tag = f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
    headers = {"accept-ranges": "bytes", "etag": tag, "cache-control": "private, no-cache"}
    try:
        span = parse_range(wanted, found.st_size) if wanted and if_range in (None, tag) else None
    except Unsatisfiable:
        file.close()
        headers["content-range"] = f"bytes */{found.st_size}"
        return JSONResponse({"detail": f"the file has {found.st_size} bytes"}, 416, headers)
    start, end = span or Span(0, found.st_size)
    headers["content-length"] = str(end - start)
    if span:
        headers["content-range"] = f"bytes {start}-{end - 1}/{found.st_size}"
    return StreamingResponse(_chunks(file, start, end), 206 if span else 200, headers, media_type)


def parse_range(header: str, size: int) -> Span | None:
    """One range of bytes. None, which means the whole file, for anything else, as the standard has it: other units,
    several ranges, nonsense. Raises Unsatisfiable."""
    found = re.fullmatch(r"bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", header)
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if not first:
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size:
        raise Unsatisfiable
    return Span(start, end)


def _chunks(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    with file:
        while start < end:
            chunk = os.pread(file.fileno(), min(_CHUNK, end - start), start)
            if not chunk:  # it was cut off meanwhile: the connection ends short of what was announced
                return
            start += len(chunk)
            yield chunk
