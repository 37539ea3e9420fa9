"""The frames that a model chose of a video, as thumbnails for the error page, with their times and shares."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from adaclip_finetune.compare.checkpoints import OpenCandidate
from adaclip_finetune.data.annotations import VideoAnnotation
from adaclip_finetune.data.dataset import VideoReader, collate
from adaclip_finetune.data.frame_store import FrameError, FrameStore
from adaclip_finetune.data.video.folder import VideoFolder

_HEIGHT = 96  # pixels
_MOST = 16  # frames of a strip


@dataclass(frozen=True)
class StripFrame:
    """A thumbnail, `picture`, as a data URI, and the number of the frame, `index`, from 0.

    `seconds` is None if not known; without `measured` it is an estimate from the length or the frame rate, as if
    frames were evenly spaced. `share` is the percentage of the selector's softmax, None without a selector.
    """

    index: int
    seconds: float | None
    measured: bool
    share: float | None
    picture: str


@dataclass(frozen=True)
class Strip:
    """The chosen frames in the order of time; `problem` says why there are none."""

    frames: list[StripFrame] = field(default_factory=list)
    problem: str = ""


class StripMaker:
    """Makes the strip of each video once."""

    def __init__(self, model: OpenCandidate, store: FrameStore, videos: Mapping[str, VideoAnnotation]) -> None:
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
        """Return the length of a video: as its file says, else as annotated, else as estimated; None if not known."""
        video, annotated = self._videos[video_id], None
        if video.start is not None and video.end is not None:
            annotated = video.end - video.start
        annotated = annotated if video.duration is None else video.duration
        if isinstance(self._store, VideoFolder):
            with suppress(FrameError):
                times = self._store.shown(video_id, [])
                return times.length if times.length_measured or annotated is None else annotated
        return annotated

    def _make(self, video_id: str) -> Strip:
        chosen = self._chosen(video_id)
        indices = [index for index, _ in chosen]
        seconds: Sequence[float | None]
        if isinstance(self._store, VideoFolder):
            times = self._store.shown(video_id, indices)
            seconds, measured = times.shown, times.shown_measured
        else:
            count, length = self._store.count(video_id), self.seconds(video_id)
            seconds, measured = [None if length is None else index / count * length for index in indices], False
        pictures = map(_picture, self._store.read(video_id, indices))
        shown = zip(chosen, seconds, pictures, strict=True)
        return Strip([StripFrame(index, at, measured, share, picture) for (index, share), at, picture in shown])

    @torch.no_grad()
    def _chosen(self, video_id: str) -> Sequence[tuple[int, float | None]]:
        """Return the numbers of the chosen frames, ascending, each with its share."""
        session = self._model.session
        batch = collate([self._reader.read(video_id)]).videos
        assert batch is not None, "a video that cannot be read raises FrameError"
        candidates = batch.frame_indices[0].tolist()  # -1 where a short video is padded
        with session.autocast():
            selection = session.model.eval().encode_video(batch.to(session.device)).selection
        if selection is None:
            return [(index, None) for index in candidates if index >= 0][:_MOST]
        shares = (100 * selection.logits[0].float().softmax(dim=0)).tolist()
        chosen = [(candidates[place], shares[place]) for place in sorted(selection.indices[0].tolist())]
        return [(index, share) for index, share in chosen if index >= 0][:_MOST]


def _picture(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    content = io.BytesIO()
    image.resize((max(1, round(image.width * _HEIGHT / image.height)), _HEIGHT)).save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
