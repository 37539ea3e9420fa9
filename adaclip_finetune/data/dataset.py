"""From a video's name to tensors: choose frames, read them, resize them, stack them into batches.

A dataset returns the FrameError of a video that fails as an item instead of raising it: the main process must learn the
video's name, and one broken video must not remove the other rows of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from adaclip_finetune.config import Config
from adaclip_finetune.data.class_names import PLACE, read_templates
from adaclip_finetune.data.frame_store import FrameError, FrameStore
from adaclip_finetune.data.frame_vectors import VectorsOfFrames
from adaclip_finetune.data.preprocess import ImageSpec, Views, draw_crop_flip, to_squares
from adaclip_finetune.data.queries import TrainEntry, drawn
from adaclip_finetune.data.sampling import frame_indices, generator

Number = TypeVar("Number", np.uint8, np.int64)


@dataclass(frozen=True)
class VideoBatch:
    """B videos of N frames each. Pixels are uint8, at the tower's size; they are normalised later, on the device."""

    frames: Tensor  # uint8 (B, N, 3, S, S)
    frame_mask: Tensor  # bool (B, N), False: a zero frame (zero after normalisation)
    policy_frames: Tensor | None  # uint8 (B, N, C, P, P), the selector's view of the frames, if it has one
    frame_indices: Tensor  # int64 (B, N), place in the video from 0; -1 for a zero frame
    video_ids: list[str]
    # In place of pixels, if vectors are kept (`frames` is then empty, (B, N, 0)):
    vectors: Tensor | None = None  # float32 (B, N, D), CLIP's embedding of each frame
    features: Tensor | None = None  # float32 (B, N, F), what the selector scores, if that is not `vectors`

    def __len__(self) -> int:
        return len(self.video_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VideoBatch:
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def at(self, places: Sequence[int]) -> VideoBatch:
        """Return the videos at these places."""
        chosen = self._mapped(lambda tensor: tensor[places])
        return replace(chosen, video_ids=[self.video_ids[place] for place in places if self.video_ids])

    def rows(self, start: int, end: int) -> VideoBatch:
        """Return the videos from `start` up to `end`."""
        return replace(self._mapped(lambda tensor: tensor[start:end]), video_ids=self.video_ids[start:end])

    def pin_memory(self) -> VideoBatch:
        """Copy the tensors to page-locked memory; the data loader calls this."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> VideoBatch:
        mapped: dict[str, Any] = {
            key: function(value) for key, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **mapped)


@dataclass(frozen=True)
class TrainBatch:
    """This process's share of a training batch; row i of everything belongs to video i.

    If the share is empty, there is one blank row, and no name in `videos.video_ids` and no caption.
    """

    videos: VideoBatch
    captions: list[str]
    token_ids: Tensor  # int64 (B, L), of the captions, or of templates with them inside
    noise: Tensor  # float32 (B, N), Gumbel(0, 1), for the frame selector
    second: VideoBatch | None = None  # the videos as the objective sees them once more (`Objective.second_view`)
    labelled: Tensor | None = None  # bool (B,), whether the text belongs to the video; None: it does in every row
    # Of an objective that uses auxiliary captions:
    auxiliary_ids: Tensor | None = None  # int64 (B, L)
    has_auxiliary: Tensor | None = None  # bool (B,), False: the video has no such caption, and its ids mean nothing

    def __len__(self) -> int:
        return len(self.videos)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TrainBatch:
        """Move the videos. The other tensors, a few kilobytes, stay on the CPU."""
        second = self.second and self.second.to(device, non_blocking)
        return replace(self, videos=self.videos.to(device, non_blocking), second=second)

    def pairs(self) -> list[tuple[str, str]]:
        """Return the video and the caption of each row."""
        return list(zip(self.videos.video_ids, self.captions, strict=True))

    def rows(self, start: int, end: int) -> TrainBatch:
        """Return the rows from `start` up to `end`."""
        return replace(
            self,
            videos=self.videos.rows(start, end),
            captions=self.captions[start:end],
            token_ids=self.token_ids[start:end],
            noise=self.noise[start:end],
            second=self.second and self.second.rows(start, end),
            labelled=None if self.labelled is None else self.labelled[start:end],
            auxiliary_ids=None if self.auxiliary_ids is None else self.auxiliary_ids[start:end],
            has_auxiliary=None if self.has_auxiliary is None else self.has_auxiliary[start:end],
        )


@dataclass(frozen=True)
class VideoItem:
    """One row of a VideoBatch, as arrays; in training with its caption, auxiliary caption ("": none) and noise (N,).

    `prompt` is the caption as the text tower reads it: in a template, if it names a class (`train_templates`).
    """

    video_id: str
    frames: NDArray[np.uint8]  # (N, 3, S, S)
    policy_frames: NDArray[np.uint8] | None
    indices: NDArray[np.int64]  # (N,)
    text: str = ""
    prompt: str = ""
    auxiliary: str = ""
    noise: NDArray[np.float32] | None = None
    vectors: VectorsOfFrames | None = None
    second: VideoItem | None = None
    labelled: bool = True


@dataclass(frozen=True)
class Collated:
    """What a worker returns for a batch: the rows that could be read (`videos` is None if there are none), their
    captions, prompts, auxiliary captions, noise and labels, and the errors of the others."""

    videos: VideoBatch | None
    texts: list[str]
    prompts: list[str]
    auxiliary: list[str]
    noise: Tensor | None
    failures: list[FrameError]
    labelled: list[bool]
    second: VideoBatch | None = None

    def pin_memory(self) -> Collated:
        videos, second = self.videos and self.videos.pin_memory(), self.second and self.second.pin_memory()
        return replace(self, videos=videos, second=second)


class VideoReader:
    """Reads frames of videos, chosen as the config says and prepared as `views` say."""

    def __init__(self, store: FrameStore, config: Config, views: Views) -> None:
        self.store, self.config, self.views = store, config, views

    def read(self, video_id: str, random: np.random.Generator | None = None) -> VideoItem:
        """Read the frames that `frames_to_read` chooses. Raises FrameError.

        With a generator, frames are drawn and augmented as in training, if the config says so.
        """
        config = self.config
        if self.views.vectors is not None:
            kept = self.views.vectors.read(self.store, video_id)
            return VideoItem(video_id, np.zeros((config.num_frm, 0), np.uint8), None, kept.indices, vectors=kept)
        indices = frames_to_read(self.store, config, video_id, random if config.sampling != "uniform" else None)
        different, place = np.unique(indices, return_inverse=True)  # a short video repeats frames: resize each once
        pixels = self.store.read(video_id, different.tolist())
        part = None
        if random is not None and config.augmentation is not None:
            height, width, _ = pixels[0].shape
            part = draw_crop_flip(height, width, random)
        views = to_squares(pixels, self.views.specs, part)
        frames, *policy_frames = (_padded(view[place], config.num_frm, 0) for view in views)
        return VideoItem(video_id, frames, next(iter(policy_frames), None), _padded(indices, config.num_frm, -1))

    def black(self, video_id: str) -> VideoItem:
        """Return black frames in place of those of a video, without reading it."""
        count, clip, selector = self.config.num_frm, self.views.clip, self.views.selector
        policy_frames = None if selector is None else _zeros(count, selector)
        return VideoItem(video_id, _zeros(count, clip), policy_frames, np.zeros(count, np.int64))


class TrainDataset(Dataset[VideoItem | FrameError]):
    """Training items by (epoch, index), so that random draws do not depend on the worker that makes them.

    An index beyond the last entry starts again with the first one, with other draws. With a `second` reader each video,
    or each that is not labelled, is read once more by it, with draws of its own. If the objective does not see the
    videos, they are black and are not read.
    """

    def __init__(
        self,
        entries: Sequence[TrainEntry],
        reader: VideoReader,
        second: VideoReader | None = None,
        second_of_labelled: bool = True,
    ) -> None:
        self.entries, self.reader, self.seed = entries, reader, reader.config.seed
        self.second, self.second_of_labelled = second, second_of_labelled
        self.templates = read_templates(reader.config.task_settings.training_templates)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: tuple[int, int]) -> VideoItem | FrameError:
        epoch, index = key
        try:
            entry = self.entries[index % len(self.entries)]
            if self.reader.config.trains_on_videos:
                item = self.reader.read(entry.video_id, generator("frames", self.seed, *key))
            else:
                item = self.reader.black(entry.video_id)
            if self.second is not None and (self.second_of_labelled or not entry.labelled):
                item = replace(item, second=self.second.read(entry.video_id, generator("second", self.seed, *key)))
            elif self.second is not None:
                item = replace(item, second=self.second.black(entry.video_id))
        except FrameError as error:
            return error
        noise = generator("selection", self.seed, epoch, index).gumbel(size=self.reader.config.num_frm)
        text, auxiliary = (draw(self.seed, epoch, index) for draw in (entry.sentence, entry.auxiliary_caption))
        template = drawn("template", self.templates, self.seed, epoch, index) if entry.labelled else PLACE
        item = replace(item, text=text, prompt=template.replace(PLACE, text), auxiliary=auxiliary)
        return replace(item, noise=noise.astype(np.float32), labelled=entry.labelled)


class GalleryDataset(Dataset[VideoItem | FrameError]):
    """The videos of an evaluation, each once, by index."""

    def __init__(self, video_ids: Sequence[str], reader: VideoReader) -> None:
        self.video_ids, self.reader = video_ids, reader

    def __len__(self) -> int:
        return len(self.video_ids)

    def __getitem__(self, index: int) -> VideoItem | FrameError:
        try:
            return self.reader.read(self.video_ids[index])
        except FrameError as error:
            return error


def frames_to_read(
    store: FrameStore, config: Config, video_id: str, random: np.random.Generator | None = None
) -> NDArray[np.int64]:
    """Return the indices of the frames that the config asks for: evenly spaced or, with a generator, drawn by it."""
    return frame_indices(
        store.count(video_id),
        config.num_frm,
        segment=config.segment_sampling,
        to_last=config.to_last_frame,
        subset=config.num_frm_subset,
        random=random,
        draw=config.sampling,
        times=store.times(video_id),
    )


def collate(items: Sequence[VideoItem | FrameError]) -> Collated:
    """Stack the videos that could be read into a batch."""
    good = [item for item in items if isinstance(item, VideoItem)]
    failures = [item for item in items if isinstance(item, FrameError)]
    if not good:
        return Collated(None, [], [], [], None, failures, [])
    noise = [item.noise for item in good if item.noise is not None]
    seconds = [item.second for item in good if item.second is not None]
    return Collated(
        _stacked(good),
        [item.text for item in good],
        [item.prompt for item in good],
        [item.auxiliary for item in good],
        torch.from_numpy(np.stack(noise)) if noise else None,
        failures,
        [item.labelled for item in good],
        _stacked(seconds) if seconds else None,
    )


def _stacked(items: Sequence[VideoItem]) -> VideoBatch:
    indices = torch.from_numpy(np.stack([item.indices for item in items]))
    policy_frames = [item.policy_frames for item in items if item.policy_frames is not None]
    kept = [item.vectors for item in items if item.vectors is not None]
    features = [one.features for one in kept if one.features is not None]
    return VideoBatch(
        frames=torch.from_numpy(np.stack([item.frames for item in items])),
        frame_mask=indices >= 0,
        policy_frames=torch.from_numpy(np.stack(policy_frames)) if policy_frames else None,
        frame_indices=indices,
        video_ids=[item.video_id for item in items],
        vectors=torch.from_numpy(np.stack([one.vectors for one in kept])) if kept else None,
        features=torch.from_numpy(np.stack(features)) if features else None,
    )


def _zeros(count: int, view: ImageSpec) -> NDArray[np.uint8]:
    return np.zeros((count, view.channels, view.size, view.size), np.uint8)


def _padded(rows: NDArray[Number], length: int, value: int) -> NDArray[Number]:
    """Append rows of `value` up to `length` rows."""
    if len(rows) == length:
        return rows
    return np.concatenate([rows, np.full((length - len(rows), *rows.shape[1:]), value, rows.dtype)])
