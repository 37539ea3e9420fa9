"""Frames that a model chose of a video, small enough to stand inside a page, with their scores."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from adaclip_finetune.compare.model import OpenModel
from adaclip_finetune.data.annotations import VideoAnnotation
from adaclip_finetune.data.dataset import VideoReader, collate
from adaclip_finetune.data.frame_store import FrameError, FrameStore
from adaclip_finetune.data.video.folder import VideoFolder

_HEIGHT = 96  # pixels
_MOST = 16  # frames of a strip


@dataclass(frozen=True)
class ShownFrame:
    """`index` from 0; `seconds` from the start where they are known, and whether they are `measured`, not reckoned from
    the annotated length or the rate as if frames were evenly spaced; `share` of the selector's softmax over all
    candidates in percent, where there is a selector; `picture` a JPEG as data URI."""

    index: int
    seconds: float | None
    measured: bool
    share: float | None
    picture: str


@dataclass(frozen=True)
class Strip:
    """Chosen frames in the order of time; `problem` says why there are none."""

    frames: list[ShownFrame] = field(default_factory=list)
    problem: str = ""


class StripMaker:
    """Makes each video's strip once."""

    def __init__(self, model: OpenModel, store: FrameStore, videos: dict[str, VideoAnnotation]) -> None:
        self._model, self._store, self._videos = model, store, videos
        self._reader = VideoReader(store, model.config, model.session.model.views())
        self._made: dict[str, Strip] = {}

    def __call__(self, video_id: str) -> Strip:
        if video_id not in self._made:
            try:
                self._made[video_id] = self._make(video_id)
            except FrameError as error:
                self._made[video_id] = Strip(problem=error.reason)
        return self._made[video_id]

    def seconds(self, video_id: str) -> float | None:
        """The length of a video, as its file says, else as the annotation does, else as reckoned. None: not known."""
        reckoned = None
        if isinstance(self._store, VideoFolder):
            with suppress(FrameError):
                times = self._store.times(video_id, [])
                if times.length_measured:
                    return times.length
                reckoned = times.length
        video = self._videos[video_id]
        if video.duration is not None:
            return video.duration
        return reckoned if video.start is None or video.end is None else video.end - video.start

    def _make(self, video_id: str) -> Strip:
        chosen = self._chosen(video_id)
        indices = [index for index, _ in chosen]
        times, measured = self._times(video_id, indices)
        pixels = self._store.read(video_id, indices)
        return Strip(
            [
                ShownFrame(index, seconds, measured, share, _picture(image))
                for (index, share), seconds, image in zip(chosen, times, pixels, strict=True)
            ]
        )

    def _times(self, video_id: str, indices: Sequence[int]) -> tuple[list[float | None], bool]:
        """When they are shown, and whether that is measured."""
        if isinstance(self._store, VideoFolder):
            times = self._store.times(video_id, indices)
            return times.shown, times.shown_measured
        count, length = self._store.count(video_id), self.seconds(video_id)
        return [None if length is None else index / count * length for index in indices], False

    @torch.no_grad()
    def _chosen(self, video_id: str) -> Sequence[tuple[int, float | None]]:
        """Indices in the video, ascending, each with its share."""
        session = self._model.session
        batch = collate([self._reader.read(video_id)]).videos
        assert batch is not None, "a video that cannot be read is a FrameError"
        places = batch.frame_indices[0]
        with session.autocast():
            selection = session.model.eval().encode_video(batch.to(session.device)).selection
        if selection is None:
            return [(index, None) for index in places.tolist() if index >= 0][:_MOST]
        shares = 100 * selection.logits[0].float().softmax(dim=0).cpu()
        chosen = [(int(places[number]), float(shares[number])) for number in sorted(selection.indices[0].tolist())]
        return [(index, share) for index, share in chosen if index >= 0][:_MOST]


def _picture(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    image = image.resize((max(1, round(image.width * _HEIGHT / image.height)), _HEIGHT))
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
