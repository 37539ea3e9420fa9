"""The page of `adaclip serve` and the JSON API behind it."""

from __future__ import annotations

import asyncio
import io
import os
import secrets
import shutil
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from mimetypes import guess_type
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, StringConstraints
from starlette.background import BackgroundTask
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adaclip_finetune import __version__
from adaclip_finetune.data.video.remote import RemotePath
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.cut import can_cut, has_file
from adaclip_finetune.search.index import Hit
from adaclip_finetune.search.indexed_moments import FoundMoment
from adaclip_finetune.search.pictures import open_picture
from adaclip_finetune.search.query import is_one_text
from adaclip_finetune.search.serve.served import ModelThread, Searches, ServedVideos
from adaclip_finetune.search.serve.streaming import stream_range
from adaclip_finetune.search.stores.base import Searchable
from adaclip_finetune.search.threshold import thresholds_of
from adaclip_finetune.search.transcripts import Transcripts

if TYPE_CHECKING:
    from adaclip_finetune.search.search_model import SearchModel

MAX_BYTES = 20 * 2**20  # of a picture that is sent
MAX_PIXELS = 50_000_000  # of a picture, 200 MB decoded
MAX_TEXT, MAX_K, MAX_PAGE = 500, 50, 10_000_000
MAX_CLIP = 600  # seconds, of a clip

_PICTURES = ("JPEG", "PNG", "WEBP")
_MEDIA_TYPES = {".m4v": "video/mp4", ".mkv": "video/x-matroska"}  # those that Python does not know
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_PAGE = Path(__file__).parent / "page"
_FOR_A_WHILE = {"cache-control": "private, max-age=600"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class StatusAnswer(BaseModel):
    """Whether the server can search."""

    state: Literal["loading", "ready", "failed"] = Field(description="state of the model")
    message: str | None = Field(description="why nothing can be searched, and what to do")
    index: str = Field(description="name of the index")
    videos: int = Field(description="number of videos in the index")
    moments: int = Field(description="number of windows or shots in the index; 0 if videos were not divided")
    lines: int = Field(description="number of lines in the transcripts of the videos")
    model: str = Field(description="name of the run, checkpoint or CLIP that the index was made with")
    finetuned: bool = Field(description="false for a pretrained CLIP")


class FoundFrame(BaseModel):
    """A frame that the vector of a video was made of."""

    index: int = Field(description="in the video, from 0")
    time: float | None = Field(description="seconds, as a player counts")
    weight: float = Field(description="share of the video's vector; the weights sum to 1")
    picture: str = Field(description="URL of its JPEG")


class FoundPart(BaseModel):
    """A moment of a video."""

    start: float = Field(description="seconds, as a player counts")
    end: float = Field(description="seconds")
    score: float = Field(description="cosine between query and the best window in it")
    time: float = Field(description="seconds, of the frame that stands for it")
    poster: str = Field(description="URL of the JPEG of that frame")
    clip: str | None = Field(description="URL of the moment as a file; null if its video is no file on this machine")


class SaidLine(BaseModel):
    """What is said in a video."""

    start: float = Field(description="seconds")
    end: float = Field(description="seconds")
    text: str


class FoundVideo(BaseModel):
    """A video that was found, or one in which a moment was found."""

    rank: int = Field(description="from 1")
    score: float = Field(description="cosine between query and video, or query and moment")
    id: str
    path: str = Field(description="of the file, on the machine of the server")
    duration: float | None = Field(description="seconds")
    captions: list[str]
    frames: list[FoundFrame] = Field(description="in order of time")
    best: int = Field(description="position in `frames` of the one with the greatest weight")
    poster: str = Field(description="URL of the JPEG of that frame")
    video: str | None = Field(description="URL of the file; null if the index was made of frames")
    copies: list[str] = Field(description="paths of other videos with the same vector")
    moments: list[FoundPart] = Field(description="the best moments, best first; the found one, if moments are searched")
    line: SaidLine | None = Field(description="the line of its transcript that was found, if `hybrid`")


class SearchAnswer(BaseModel):
    """One page of the videos or moments that were found."""

    page: int = Field(description="from 1")
    pages: int = Field(description="number of pages; if moments are searched, at least this many")
    videos: int = Field(description="number of different videos for which the conditions hold; copies count as one")
    nothing: str | None = Field(
        description="on the first page, that nothing shows what was asked for, and how certain that is; null if the "
        "best score is high enough, or if `adaclip calibrate` did not measure which one is"
    )
    found: list[FoundVideo]


Text = Annotated[str, Query(min_length=1, max_length=MAX_TEXT, description="what the video shows")]
PageNumber = Annotated[int, Query(ge=1, le=MAX_PAGE, description="which page")]
PageSize = Annotated[int, Query(ge=1, le=MAX_K, description="videos, or moments, per page")]
By = Annotated[Literal["video", "moment"], Query(description="what to find; a video may have several moments")]
Score = Annotated[
    Literal["whole", "moment"] | None,
    Query(description="what ranks videos: their own vector, or their best moment; the latter for a pretrained CLIP"),
]
Where = Annotated[
    list[Annotated[str, StringConstraints(max_length=MAX_TEXT)]] | None,
    Query(max_length=20, description="conditions on the videos, such as `duration > 60 and season = 3`"),
]
Hybrid = Annotated[bool, Query(description="whether to look for the text in transcripts, too; both rankings are fused")]
Seconds = Annotated[float, Query(ge=0, le=1e6, allow_inf_nan=False, description="as a player counts")]
Key = Annotated[str, InPath(pattern="^[0-9a-f]{20}$", description="of a video, as a search gives it")]
FrameNumber = Annotated[int, InPath(ge=0, description="position among the frames or windows of the video, from 0")]


class Page:
    """Which videos or moments a search returns."""

    def __init__(
        self, page: PageNumber = 1, k: PageSize = 12, by: By = "video", score: Score = None, where: Where = None
    ) -> None:
        self.page, self.k, self.by, self.score, self.where = page, k, by, score, where or ()


def create_app(model: ModelThread, index: Searchable, token: str | None = None, host: str = "127.0.0.1") -> FastAPI:
    """Return the application. With a `token`, every request must know it; without, only those pass that address this
    machine by `host` or a name of the loopback, so that no other site can make a browser ask (DNS rebinding)."""
    app = FastAPI(title="adaclip serve", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, token=token)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["*"] if token else [*_LOOPBACK, host])
    _add_searches(app, model, index)
    _add_media(app, ServedVideos(index))
    app.mount("/", StaticFiles(directory=_PAGE, html=True))
    for error in (UserError, Exception):
        app.add_exception_handler(error, _server_error)
    app.add_exception_handler(RequestValidationError, _bad_request)
    app.add_exception_handler(ClientDisconnect, _no_answer)
    return app


def make_server(app: ASGIApp) -> uvicorn.Server:
    """Return a server for `app`: at most 100 connections, and no access log, which would contain the token."""
    limits: dict[str, Any] = {"limit_concurrency": 100, "timeout_keep_alive": 10, "timeout_graceful_shutdown": 0}
    logs: dict[str, Any] = {"access_log": False, "log_config": None, "log_level": "critical"}
    others: dict[str, Any] = {"http": "h11", "ws": "none", "server_header": False, "proxy_headers": False}
    return uvicorn.Server(uvicorn.Config(app, **limits, **logs, **others))


def _add_searches(app: FastAPI, model: ModelThread, index: Searchable) -> None:
    thresholds, transcripts, searches = thresholds_of(index), Transcripts(index.folder), Searches(model)

    async def answer(
        encode: Callable[[SearchModel], Any], asked: Page, text: str | None = None, hybrid: bool = False
    ) -> SearchAnswer:
        page, k, by, score = asked.page, asked.k, asked.by, asked.score
        if "moment" in (by, score) and index.moments is None:
            raise HTTPException(422, "moment: this index has no moments; `adaclip index --moments` adds them")
        find: Callable[..., list[list[Hit]]] = (
            partial(index.search, score=score) if by == "video" else index.search_moments
        )
        first, last = (page - 1) * k, page * k
        try:
            count = await asyncio.to_thread(index.count, asked.where)
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        # One more than the page holds says whether another page of moments follows.
        narrowed = partial(find, k=last + 1, ranks=slice(first, last + 1), where=asked.where)
        if hybrid:
            lines = [await asyncio.to_thread(transcripts.find, text or "")]
            hits = (await model.run(lambda loaded: narrowed(encode(loaded), lines=lines)))[0]
        elif "moment" in (by, index.ranked_by(score)) or last > MAX_K:  # together it would take longer, or much memory
            hits = (await model.run(lambda loaded: narrowed(encode(loaded))))[0]
        else:
            hits = await searches.hits(encode, narrowed)
        pages = -(-count // k) if by == "video" else page + (len(hits) > k)
        threshold = None
        if text is not None and is_one_text(text) and not hybrid:
            threshold = thresholds.get("moment" if by == "moment" else index.ranked_by(score))
        nothing = threshold.nothing_found(hits[0].score, index.distinct) if threshold and hits and page == 1 else None
        found = [_found(hit) for hit in hits[:k]]
        return SearchAnswer(page=page, pages=pages, videos=count, nothing=nothing, found=found)

    @app.get("/api/status")
    async def status() -> StatusAnswer:
        """Return whether the model is ready, and how many videos there are."""
        about: dict[str, Any] = {"model": index.info.model_name, "finetuned": not index.info.untrained}
        about |= {"videos": len(index), "moments": 0 if index.moments is None else len(index.moments)}
        about |= {"lines": await asyncio.to_thread(transcripts.count) if index.fuses else 0}
        return StatusAnswer(state=model.state, message=model.message, index=index.name, **about)

    @app.get("/api/search")
    async def search(q: Text, asked: Annotated[Page, Depends()], hybrid: Hybrid = False) -> SearchAnswer:
        """Return the videos, or moments, that show what a text says, best first."""
        if not q.strip():
            raise HTTPException(422, "q: is empty")

        def encode(loaded: SearchModel) -> Any:
            try:
                return loaded.encode_query([q.strip()])
            except UserError as error:
                raise HTTPException(422, f"q: {error}") from error

        if hybrid and (asked.by == "moment" or not (index.fuses and transcripts.count())):
            raise HTTPException(422, "hybrid: needs transcripts in the index, and finds videos, not moments")
        return await answer(encode, asked, q.strip(), hybrid)

    picture = {"content": {f"image/{kind.lower()}": {} for kind in _PICTURES}, "required": True}

    @app.post("/api/search/image", openapi_extra={"requestBody": picture})
    async def search_image(request: Request, asked: Annotated[Page, Depends()]) -> SearchAnswer:
        """Return the videos, or moments, that look like a picture, which is the body of the request."""
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAX_BYTES:
                raise HTTPException(413, f"the picture has more than {MAX_BYTES // 2**20} MB")
        try:
            image = await asyncio.to_thread(open_picture, io.BytesIO(content), _PICTURES, MAX_PIXELS)
        except UserError as error:
            raise HTTPException(400, str(error)) from error
        return await answer(lambda loaded: loaded.encode_image(image)[None], asked)


def _add_media(app: FastAPI, videos: ServedVideos) -> None:
    one_at_a_time, one_cut_at_a_time = asyncio.Lock(), asyncio.Lock()

    @app.get("/api/videos/{key}/file", response_class=FileResponse)
    def file(key: Key, request: Request) -> Response:
        """Return the video file; range requests are supported."""
        path = videos.file(key)
        media_type = _MEDIA_TYPES.get(path.suffix.lower())
        if isinstance(path, RemotePath):
            return stream_range(path, request.headers.get("range"), media_type or guess_type(path.name)[0])
        return FileResponse(path, media_type=media_type)

    @app.get("/api/videos/{key}/poster", response_class=FileResponse)
    def poster(key: Key) -> Response:
        """Return the frame with the greatest weight as a small JPEG."""
        return FileResponse(videos.poster(key), media_type="image/jpeg", headers=_FOR_A_WHILE)

    @app.get("/api/videos/{key}/moments/{number}/poster", response_class=FileResponse)
    def moment_poster(key: Key, number: FrameNumber) -> Response:
        """Return the frame that stands for a moment as a small JPEG."""
        return FileResponse(videos.moment_poster(key, number), media_type="image/jpeg", headers=_FOR_A_WHILE)

    @app.get("/api/videos/{key}/clip", response_class=FileResponse)
    async def clip(key: Key, start: Seconds, end: Seconds, exact: bool = False) -> Response:
        """Return the part from `start` to `end`, at most ten minutes, as a file: as it is stored, or encoded anew."""
        if not 0 < end - start <= MAX_CLIP:
            raise HTTPException(422, f"end: must be after start, by at most {MAX_CLIP} seconds")
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp))
        remove = BackgroundTask(shutil.rmtree, folder, ignore_errors=True)
        try:
            async with one_cut_at_a_time:
                path = await asyncio.to_thread(videos.cut, key, start, end, exact, folder)
        except HTTPException:
            await remove()
            raise
        return FileResponse(path, filename=path.name, media_type=_MEDIA_TYPES.get(path.suffix), background=remove)

    @app.get("/api/videos/{key}/frames/{number}", response_class=Response)
    async def frame(key: Key, number: FrameNumber) -> Response:
        """Return one of the frames that the vector was made of as a small JPEG."""
        async with one_at_a_time:
            content = await asyncio.to_thread(videos.frame, key, number)
        return Response(content, headers=_FOR_A_WHILE, media_type="image/jpeg")


class Gate:
    """Middleware that refuses requests of other sites and without the token, and adds headers to every answer."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request (ASGI)."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("cache-control", "no-cache")
            await send(message)

        await (self._answer(Request(scope)) or self.app)(scope, receive, send_with_headers)

    def _answer(self, request: Request) -> Response | None:
        """Return the answer to a request that must not reach the application."""
        opened = request.url.path == "/" and request.headers.get("sec-fetch-mode") == "navigate"
        if not opened and request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return JSONResponse({"detail": "this request comes from the page of another site"}, 403)
        if self.token is None:
            return None
        cookie = f"adaclip_{request.scope['server'][1]}"  # browsers send a cookie to all ports of a host
        if request.url.path == "/" and self._is_token(request.query_params.get("token", "")):
            rest = request.url.remove_query_params("token").query
            answer = RedirectResponse(f"/?{rest}" if rest else "/", 303)
            answer.set_cookie(cookie, self.token, httponly=True, samesite="lax")
            return answer
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else request.cookies.get(cookie, "")
        if self._is_token(given):
            return None
        detail = "the token is missing or wrong: open the address that the terminal shows"
        return JSONResponse({"detail": detail}, 401, {"www-authenticate": "Bearer"})

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), (self.token or "").encode())


def _found(hit: Hit) -> FoundVideo:
    video, urls = hit.video, f"/api/videos/{hit.video.key}"
    return FoundVideo(
        rank=hit.rank,
        score=hit.score,
        id=video.id,
        path=_shown(video.path),
        duration=video.duration,
        captions=list(video.captions[:5]),
        frames=[
            FoundFrame(index=frame.index, time=frame.time, weight=frame.weight, picture=f"{urls}/frames/{number}")
            for number, frame in enumerate(video.frames)
        ],
        best=video.best,
        poster=f"{urls}/poster",
        video=f"{urls}/file" if has_file(video) else None,
        copies=[_shown(copy.path) for copy in hit.copies],
        moments=[_part(moment, urls, can_cut(video)) for moment in hit.moments],
        line=SaidLine(**hit.line._asdict()) if hit.line else None,
    )


def _part(moment: FoundMoment, urls: str, cut: bool) -> FoundPart:
    clip = f"{urls}/clip?start={moment.start:.3f}&end={moment.end:.3f}" if cut else None
    facts = {"start": moment.start, "end": moment.end, "score": moment.score, "time": moment.time}
    return FoundPart(**facts, poster=f"{urls}/moments/{moment.number}/poster", clip=clip)


def _shown(path: PurePath) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


async def _server_error(_request: Request, error: Exception) -> Response:
    if isinstance(error, UserError):
        return JSONResponse({"detail": str(error)}, 500)
    traceback.print_exception(error)
    return JSONResponse({"detail": "an error in the server; its terminal shows more"}, 500)


async def _bad_request(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors())}, 422)


async def _no_answer(_request: Request, _error: Exception) -> Response:
    """Answer a client that has gone, so that it does not count as an error of the server."""
    return Response(status_code=400)
