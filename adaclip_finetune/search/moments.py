"""Vectors for parts of videos: windows of equal length, or shots.

A part is embedded as a whole video is: `num_frm` of its frames are sampled as the model's settings say, and the frame
selector chooses among them. A file is decoded once, forwards, however many windows share a frame. A long video is read
in pieces, which worker processes read at the same time.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from adaclip_finetune.config import Config
from adaclip_finetune.data.dataset import VideoBatch
from adaclip_finetune.data.frame_store import FrameError, Scan
from adaclip_finetune.data.loader import FRAMES_A_GALLERY_BATCH, make_loader, stop_workers
from adaclip_finetune.data.preprocess import Views, to_squares
from adaclip_finetune.data.sampling import frame_indices
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.towers.base import FramewiseTower
from adaclip_finetune.search.collection import CollectionVideo, VideoCollection
from adaclip_finetune.search.pictures import thumbnail
from adaclip_finetune.search.search_model import SearchModel

WINDOW = 8.0  # seconds, by default
SHOT_RATE = 4.0  # frames per second that are compared to find shots
_CHANGED = 0.25  # share of the pixels that get another colour from one shot to the next
_READ_AT_ONCE = 16  # frames of a store that is no folder of videos

Span = tuple[float, float]  # start and end, in seconds


@dataclass(frozen=True)
class MomentSettings:
    """How videos are divided: into windows that start every `stride` seconds, or into shots of at most `window` s."""

    by: Literal["windows", "shots"] = "windows"
    window: float = WINDOW  # seconds
    stride: float = WINDOW / 2  # seconds; without effect on shots

    def __post_init__(self) -> None:
        """Raise UserError for lengths that divide nothing."""
        if not 0.1 <= self.window < float("inf"):
            raise UserError(f"--window {self.window:g}: at least 0.1 seconds are needed")
        if self.by == "windows" and not 0.05 <= self.stride <= self.window:
            raise UserError(
                f"--stride {self.stride:g}: must be from 0.05 seconds to --window {self.window:g}, or parts are missed"
            )

    def flags(self) -> str:
        """Return the flags of `adaclip index` that mean this."""
        stride = f" --stride {self.stride:g}" if self.by == "windows" else ""
        return f"--moments {self.by} --window {self.window:g}{stride}"

    def windows(self, length: float) -> list[Span]:
        """Return the windows of a video of this length in seconds. The last one ends with the video."""
        if length <= self.window:
            return [(0.0, round(length, 3))]
        count = int((length - self.window) / self.stride + 1e-6) + 1
        starts = [number * self.stride for number in range(count)]
        if length - self.window - starts[-1] > 1e-3:
            starts.append(length - self.window)
        return [(round(start, 3), round(start + self.window, 3)) for start in starts]


class Moment(NamedTuple):
    """A part of a video with its vector (D,), and the frame that has the greatest weight in it."""

    span: Span
    vector: NDArray[np.float32]
    frame: int  # in the video, from 0
    time: float  # when a player shows it, in seconds
    picture: bytes  # a small JPEG


def embed_moments(
    model: SearchModel, collection: VideoCollection, videos: Sequence[CollectionVideo], settings: MomentSettings
) -> Generator[tuple[CollectionVideo, list[Moment] | FrameError]]:
    """Yield each video with its moments in order of time, or with the reason why it has none."""
    pieces: list[_Piece] = []
    size = max(1, FRAMES_A_GALLERY_BATCH // model.config.num_frm)
    for video in videos:
        try:
            length = _length(video, collection)
        except FrameError as error:
            yield video, error
            continue
        if settings.by == "windows":
            spans = settings.windows(length)
            pieces += [_Piece(video, spans[start : start + size]) for start in range(0, len(spans), size)]
        else:
            borders = np.linspace(0, length, 1 + int(np.ceil(length * SHOT_RATE / FRAMES_A_GALLERY_BATCH)))
            pieces += [_Piece(video, [span]) for span in pairwise(borders.round(3).tolist())]
    dataset, batches = _Pieces(pieces, collection, model, settings), [[number] for number in range(len(pieces))]
    loader = make_loader(dataset, model.config, batches, _only)
    try:
        found: list[Moment] = []
        broken: FrameError | None = None
        for number, read in enumerate(loader if pieces else ()):
            if isinstance(read, FrameError):
                broken = read
            else:
                found += read.embedded(model)
            video = pieces[number].video
            if number + 1 == len(pieces) or pieces[number + 1].video is not video:
                yield video, broken or found
                found, broken = [], None
    finally:
        stop_workers(loader)


class _Piece(NamedTuple):
    """What is read together of a video: its windows, or a span in which shots are looked for."""

    video: CollectionVideo
    spans: list[Span]


@dataclass(frozen=True)
class _ReadPiece:
    """The frames of a piece, each once, and the moments that are made of them."""

    video_id: str
    frames: Tensor  # uint8 (G, 3, S, S)
    policy_frames: Tensor | None  # uint8 (G, C, P, P)
    numbers: Tensor  # int64 (G,), of the frames in the video
    times: list[float]  # (G,), when a player shows them, in seconds
    pictures: list[bytes]  # (G,), small JPEGs
    spans: list[Span]  # (M,)
    places: Tensor  # int64 (M, N), of the moments' frames among the G; -1: blank

    def embedded(self, model: SearchModel) -> Iterator[Moment]:
        """Yield the moments, which the model embeds in batches."""
        size = max(1, min(model.config.val_batch_size, FRAMES_A_GALLERY_BATCH // model.config.num_frm))
        place = {number: place for place, number in enumerate(self.numbers.tolist())}
        encoded = self._encoded(model) if len(self.frames) < model.model.encoded_frames * len(self.spans) else None
        for start in range(0, len(self.spans), size):
            places, spans = self.places[start : start + size], self.spans[start : start + size]
            vectors, weighted = model.embed(self._batch(places, encoded))
            for row, span in enumerate(spans):
                frames = weighted[row]  # without any, if the selector chose nothing but blank frames
                best = place[frames.frames[frames.best]] if frames.frames else int(places[row].max())
                yield Moment(span, vectors[row].numpy(), int(self.numbers[best]), self.times[best], self.pictures[best])

    def _encoded(self, model: SearchModel) -> tuple[Tensor, Tensor | None] | None:
        """Return what CLIP and the selector make of each frame by itself, and of a blank one at the end (G + 1, …).

        Windows overlap, so this encodes fewer frames than window by window. None if frames meet within CLIP.
        """
        if not isinstance(model.model.tower, FramewiseTower):
            return None
        each = torch.arange(1 + len(self.frames))[:, None]
        each[-1] = -1
        size = model.config.val_batch_size * model.config.num_frm
        parts = [model.frame_vectors(self._batch(places)) for places in torch.split(each, size)]
        features = [scored for _, scored in parts if scored is not None]
        return torch.cat([vectors for vectors, _ in parts]), torch.cat(features) if features else None

    def _batch(self, places: Tensor, encoded: tuple[Tensor, Tensor | None] | None = None) -> VideoBatch:
        """Return the frames at `places` (B, n), or in place of their pixels what they were `encoded` to."""
        there, at = places >= 0, places.clamp(min=0)

        def rows(frames: Tensor) -> Tensor:
            return frames[at] * there[..., None, None, None].to(frames.dtype)

        numbers, ids = self.numbers[at].where(there, torch.tensor(-1)), [self.video_id] * len(places)
        if encoded is not None:
            vectors, features = (None if values is None else values[places] for values in encoded)
            return VideoBatch(torch.empty(*places.shape, 0), there, None, numbers, ids, vectors, features)
        policy_frames = None if self.policy_frames is None else rows(self.policy_frames)
        return VideoBatch(rows(self.frames), there, policy_frames, numbers, ids)


class _Pieces(Dataset[_ReadPiece | FrameError]):
    """Pieces of videos, by number."""

    def __init__(
        self, pieces: Sequence[_Piece], collection: VideoCollection, model: SearchModel, settings: MomentSettings
    ) -> None:
        self.pieces, self.collection, self.settings = pieces, collection, settings
        self.config: Config = model.config
        self.views: Views = model.model.views()

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, number: int) -> _ReadPiece | FrameError:
        try:
            return self._read(*self.pieces[number])
        except FrameError as error:
            return error

    def _read(self, video: CollectionVideo, spans: list[Span]) -> _ReadPiece:
        _, known = self.collection.times(video, range(self.collection.store.count(video.id)))
        times = np.array(known, np.float64)
        if self.settings.by == "windows":
            sampled = [self._sampled(times, *_shown_between(times, *span)) for span in spans]
            wanted = np.unique(np.concatenate(sampled))
            clip, policy, pictures, _ = self._frames(video.id, wanted)
            places = [np.searchsorted(wanted, frames) for frames in sampled]
        else:
            grid = np.arange(spans[0][0], spans[0][1], 1 / SHOT_RATE)
            wanted = np.unique(np.clip(np.searchsorted(times, grid + 1e-3, side="right") - 1, 0, None))
            clip, policy, pictures, colours = self._frames(video.id, wanted)
            runs = _shots(colours, max(1, int(self.settings.window * SHOT_RATE)))
            spans = _borders(times[wanted], runs, spans[0])
            places = [self._sampled(times[wanted], *run) for run in runs]
        padded = np.full((len(places), self.config.num_frm), -1)
        for row, chosen in enumerate(places):
            padded[row, : len(chosen)] = chosen
        return _ReadPiece(
            video.id,
            torch.from_numpy(clip),
            None if policy is None else torch.from_numpy(policy),
            torch.from_numpy(wanted),
            times[wanted].tolist(),
            pictures,
            spans,
            torch.from_numpy(padded),
        )

    def _sampled(self, times: NDArray[np.float64], start: int, end: int) -> NDArray[np.int64]:
        """Sample the frames from `start` up to `end` as those of a whole video are."""
        return start + frame_indices(
            end - start,
            self.config.num_frm,
            segment=self.config.segment_sampling,
            to_last=self.config.to_last_frame,
            subset=self.config.num_frm_subset,
            times=times[start:end],
        )

    def _frames(
        self, video_id: str, wanted: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None, list[bytes], NDArray[np.float64]]:
        """Return frames for CLIP and for the selector, and pictures and shares of colours (G, 64) of them."""
        views, pictures, colours = [], [], []
        for _, frame in self._stream(video_id, wanted.tolist()):
            views.append(to_squares(frame[None], self.views.specs))
            pictures.append(thumbnail(frame))
            colours.append(_colours(frame))
        clip, *policy = (np.concatenate(view) for view in zip(*views, strict=True))
        return clip, next(iter(policy), None), pictures, np.stack(colours)

    def _stream(self, video_id: str, wanted: list[int]) -> Scan:
        store = self.collection.store
        if isinstance(store, VideoFolder):
            yield from store.stream(video_id, wanted)
            return
        for start in range(0, len(wanted), _READ_AT_ONCE):
            numbers = wanted[start : start + _READ_AT_ONCE]
            yield from zip(numbers, store.read(video_id, numbers), strict=True)


def _length(video: CollectionVideo, collection: VideoCollection) -> float:
    """Return the length of a video in seconds. Raise FrameError if it is not known, or when frames are shown."""
    length, (first,) = collection.times(video, [0])
    if length is None and (times := collection.store.times(video.id)) is not None and len(times) > 1:
        length = float(times[-1] + np.diff(times).mean())
    if not length or first is None:
        reason = "its length is not known, which moments need: give its duration in the annotation"
        raise FrameError(video.id, video.path, reason)
    return length


def _only(items: list[Any]) -> Any:
    return items[0]


def _shown_between(times: NDArray[np.float64], start: float, end: float) -> tuple[int, int]:
    """Return the first frame that is shown in this span, and the one after the last; at least one."""
    first = max(0, int(np.searchsorted(times, start + 1e-3, side="right")) - 1)
    return first, max(first + 1, int(np.searchsorted(times, end - 1e-3)))


def _colours(frame: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the shares of 64 colours among the pixels of a frame, of which about 64 x 64 are looked at."""
    height, width, _ = frame.shape
    seen = frame[:: max(1, height // 64), :: max(1, width // 64)] >> 6
    number = (seen[..., 0] << 4) + (seen[..., 1] << 2) + seen[..., 2]
    shares: NDArray[np.float64] = np.bincount(number.ravel(), minlength=64) / number.size
    return shares


def _shots(colours: NDArray[np.float64], longest: int) -> list[tuple[int, int]]:
    """Return first and end of each run of frames, at least two, between sudden changes of colour (G, 64).

    Runs of more than `longest` frames are divided evenly.
    """
    changed = np.abs(np.diff(colours, axis=0)).sum(axis=1) / 2 > _CHANGED
    cuts = [0]
    for cut in (np.flatnonzero(changed) + 1).tolist():
        if cut - cuts[-1] >= 2 and len(colours) - cut >= 2:
            cuts.append(cut)
    runs = []
    for start, end in pairwise([*cuts, len(colours)]):
        parts = np.linspace(start, end, 1 + -(-(end - start) // longest)).astype(int).tolist()
        runs += list(pairwise(parts))
    return runs


def _borders(times: NDArray[np.float64], runs: Sequence[tuple[int, int]], span: Span) -> list[Span]:
    """Return start and end of each run of frames: halfway between the last frame of one and the first of the next."""
    times = times.clip(min=span[0])  # the first frame may be shown since before the span
    inner = [round(float(times[start - 1] + times[start]) / 2, 3) for start, _ in runs[1:]]
    return list(pairwise([span[0], *inner, span[1]]))
