"""What the API says, as JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from adaclip_finetune.search.index import Hit
from adaclip_finetune.search.serve.media import Media, key_of


class Status(BaseModel):
    """How far the server is."""

    state: Literal["loading", "ready", "failed"] = Field(description="of the model")
    message: str | None = Field(description="why nothing can be searched, and the way out")
    index: str = Field(description="the name of the index")
    videos: int = Field(description="how many it holds")


class Refused(BaseModel):
    """Every answer that is not 2xx."""

    detail: str = Field(description="what is wrong")


class Frame(BaseModel):
    """One of the frames that the selector kept."""

    index: int = Field(description="in the video, from 0")
    time: float | None = Field(description="seconds, as a player counts")
    weight: float = Field(description="in the video's vector; all of them sum to 1")
    picture: str = Field(description="where its JPEG is")


class Found(BaseModel):
    """A video that was found."""

    rank: int = Field(description="from 1")
    score: float = Field(description="cosine between query and video")
    id: str
    path: str = Field(description="of the file, on the machine of the server")
    duration: float | None = Field(description="seconds")
    captions: list[str]
    frames: list[Frame] = Field(description="in the order of time")
    best: int = Field(description="the place in `frames` of the one that weighs most")
    poster: str | None = Field(description="where its picture (JPEG) is")
    video: str | None = Field(description="where the file is; null if the index was made of frames")


class Answer(BaseModel):
    """One page of the videos that were found."""

    page: int = Field(description="from 1")
    pages: int = Field(description="how many there are")
    videos: int = Field(description="how many the index holds")
    version: str = Field(description="of the index: pages of two versions do not belong together")
    found: list[Found]


def found(hit: Hit, media: Media) -> Found:
    """A hit, with the addresses of its pictures and its file."""
    video = hit.video
    place = f"/api/videos/{key_of(video)}"
    kept = zip(video.frames, video.times, video.weights, strict=True)
    return Found(
        rank=hit.rank,
        score=hit.score,
        id=video.id,
        path=str(video.path),
        duration=video.duration,
        captions=list(video.captions[:5]),
        frames=[
            Frame(index=index, time=time, weight=weight, picture=f"{place}/frames/{number}")
            for number, (index, time, weight) in enumerate(kept)
        ],
        best=video.best,
        poster=f"{place}/poster" if video.thumb else None,
        video=f"{place}/file" if media.is_file(video) else None,
    )
