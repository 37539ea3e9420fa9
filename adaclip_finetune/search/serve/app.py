"""The page and its JSON API, which /openapi.json describes to programs, and /docs to readers: a page of our own, since
FastAPI's loads its scripts from elsewhere."""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import ASGIApp

from adaclip_finetune import __version__
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import Hit
from adaclip_finetune.search.serve.answers import Answer, Refused, Status, found
from adaclip_finetune.search.serve.engine import Engine, State
from adaclip_finetune.search.serve.guard import Guard, Policy
from adaclip_finetune.search.serve.library import Library
from adaclip_finetune.search.serve.media import Gone, Media
from adaclip_finetune.search.serve.picture import FORMATS, MAX_BYTES, BadPicture
from adaclip_finetune.search.serve.ranges import file_response
from adaclip_finetune.search.serve.worker import Busy, NotReady

MAX_TEXT = 500  # characters
MAX_K, MAX_PAGE = 50, 50

_PAGE = Path(__file__).parent / "page"
_ON_PAGE = {"/": "index.html", "/docs": "docs.html"} | {
    f"/{name}": name for name in ("style.css", "script.js", "cards.js", "player.js", "docs.js", "icon.svg")
}
_REFUSED: dict[int | str, dict[str, Any]] = {"default": {"model": Refused, "description": "refused"}}
_JPEG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}, "description": "the picture"}}
_VIDEO: dict[int | str, dict[str, Any]] = {
    200: {"content": {"video/*": {}}, "description": "the file"},
    206: {"content": {"video/*": {}}, "description": "the range that was asked for"},
}
_FOR_A_WHILE = "private, max-age=600"
BODY_TIME = 60  # seconds in which a picture must have arrived

Text = Annotated[str, Query(min_length=1, max_length=MAX_TEXT, description="what the video shows")]
PageNumber = Annotated[int, Query(ge=1, le=MAX_PAGE, description="which page of them")]
PageSize = Annotated[int, Query(ge=1, le=MAX_K, description="how many videos a page")]
Key = Annotated[str, InPath(pattern="^[0-9a-f]{20}$", description="a video, as a search names it")]
Place = Annotated[int, InPath(ge=0, le=10_000, description="among the frames of the video, from 0")]


def create_app(engine: Engine, library: Library, policy: Policy) -> ASGIApp:
    """Everything that is served, behind its guard."""
    app = FastAPI(
        title="adaclip serve",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=_REFUSED,
    )
    api = _Api(engine, library)
    app.add_api_route("/api/status", api.status)
    app.add_api_route("/api/search", api.search)
    body = {"content": {f"image/{kind.lower()}": {} for kind in FORMATS}, "required": True}
    app.add_api_route("/api/search/image", api.search_image, methods=["POST"], openapi_extra={"requestBody": body})
    app.add_api_route("/api/videos/{key}/file", api.file, response_class=Response, responses=_VIDEO)
    app.add_api_route("/api/videos/{key}/poster", api.poster, response_class=Response, responses=_JPEG)
    app.add_api_route("/api/videos/{key}/frames/{place}", api.frame, response_class=Response, responses=_JPEG)
    for path, name in _ON_PAGE.items():
        app.add_route(path, _Static(_PAGE / name).answer)
    for kind, status in {Gone: 404, NotReady: 503, Busy: 503, UserError: 500}.items():
        app.add_exception_handler(kind, _Says(status))
    app.add_exception_handler(BadPicture, _bad_picture)
    app.add_exception_handler(ClientDisconnect, _nobody_listens)
    app.add_exception_handler(RequestValidationError, _wrong_request)
    app.add_exception_handler(Exception, _unforeseen)
    return Guard(app, policy)


class _Api:
    def __init__(self, engine: Engine, library: Library) -> None:
        self.engine, self.library = engine, library
        # Also of ".", and as it was called, not what a link to it leads to.
        self.name = Path(os.path.abspath(library.index.folder)).name  # noqa: PTH100

    async def status(self) -> Status:
        """Whether the model is ready, and how many videos there are."""
        await self.library.follow()
        state, message = State("failed", self.library.refused) if self.library.refused else self.engine.state
        index = self.library.index
        return Status(state=state, message=message, index=self.name, videos=len(index))

    async def search(self, q: Text, page: PageNumber = 1, k: PageSize = 12) -> Answer:
        """Videos that show what a text says, the best first."""
        if not q.strip():
            raise HTTPException(422, "q: is empty")
        media = await self._searched()
        return _answer(media, await self.engine.by_text(media.index, q.strip(), k * MAX_PAGE), page, k)

    async def search_image(self, request: Request, page: PageNumber = 1, k: PageSize = 12) -> Answer:
        """Videos that look like a picture, which is the body of the request."""
        try:
            content = await asyncio.wait_for(_body(request), BODY_TIME)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the picture did not arrive within {BODY_TIME} seconds") from None
        media = await self._searched()
        return _answer(media, await self.engine.by_picture(media.index, content, k * MAX_PAGE), page, k)

    def file(self, key: Key, request: Request) -> Response:
        """The video itself; ranges are understood."""
        file, media_type = self.library.media.video(key)
        return file_response(file, media_type, request.headers.get("range"), request.headers.get("if-range"))

    def poster(self, key: Key) -> Response:
        """The frame that weighs most, as a small JPEG."""
        answer = file_response(self.library.media.poster(key), "image/jpeg", None, None)
        answer.headers["cache-control"] = _FOR_A_WHILE
        return answer

    async def frame(self, key: Key, place: Place) -> Response:
        """One of the frames that the selector kept, as a small JPEG."""
        content = await self.library.media.frame(key, place)
        return Response(content, headers={"cache-control": _FOR_A_WHILE}, media_type="image/jpeg")

    async def _searched(self) -> Media:
        """What is in the folder now, as far as it is loaded; one request sees one index. Raises NotReady."""
        await self.library.follow()
        if self.library.refused:
            raise NotReady(self.library.refused)
        return self.library.media


class _Static:
    """One file of the page."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def answer(self, _request: Request) -> Response:
        """It."""
        return FileResponse(self.path, headers={"cache-control": "no-cache"})


class _Says:
    """The message of an exception, under one status."""

    def __init__(self, status: int) -> None:
        self.status = status

    async def __call__(self, _request: Request, error: Exception) -> Response:
        headers = {"retry-after": "2"} if self.status == 503 else None
        return JSONResponse({"detail": str(error) or "too many are asking; wait a moment"}, self.status, headers)


def _answer(media: Media, hits: list[Hit], page: int, k: int) -> Answer:
    """A part of all hits that pages may show: asked for fewer, FAISS may order equal scores otherwise, and a video
    would stand on two pages or on none."""
    videos = len(media.index)
    return Answer(
        page=page,
        pages=min(-(-videos // k), MAX_PAGE),
        videos=videos,
        version=media.index.version,
        found=[found(hit, media) for hit in hits[(page - 1) * k : page * k]],
    )


async def _body(request: Request) -> bytes:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BYTES:
            raise HTTPException(413, f"the picture has more than {MAX_BYTES // 2**20} MB")
    return bytes(content)


async def _bad_picture(_request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 413 if getattr(error, "too_large", False) else 400)


async def _nobody_listens(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)


async def _wrong_request(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    wrong = "; ".join(f"{what['loc'][-1]}: {what['msg']}" for what in error.errors())
    return JSONResponse({"detail": wrong}, 422)


async def _unforeseen(request: Request, error: Exception) -> Response:
    traceback.print_exception(error)
    print(f"adaclip serve: {request.method} {request.url.path}: {error!r}", file=sys.stderr)
    return JSONResponse({"detail": "something went wrong here; the terminal tells more"}, 500)
