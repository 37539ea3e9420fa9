"""Video files to lines of videos.jsonl and vectors, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adaclip_finetune.data.dataset import Collated, GalleryDataset, VideoReader
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.loader import GalleryLoader
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.frame_weights import Weighed
from adaclip_finetune.search.retriever import Retriever
from adaclip_finetune.search.thumbnails import write_thumbnail
from adaclip_finetune.search.videos import Clip, Source
from adaclip_finetune.training.memory import explain_out_of_memory_in_evaluation

Video = dict[str, Any]
"""A line of videos.jsonl."""


class Batch(NamedTuple):
    """Videos and their vectors (B, D), and what could not be read: id → reason."""

    videos: list[Video]
    vectors: NDArray[np.float32]
    failed: dict[str, str]


def embed_clips(model: Retriever, source: Source, clips: Sequence[Clip], thumbs: Path) -> Iterator[Batch]:
    """Their pictures are in the folder `thumbs` before a batch is given. Raises UserError, and OSError if pictures
    cannot be written."""
    by_id = {clip.id: clip for clip in clips}
    dataset = GalleryDataset(list(by_id), VideoReader(source.store, model.config, model.model.views()))
    bar = tqdm(total=len(by_id), desc="embedding", unit="video", leave=False, disable=None)
    with closing(GalleryLoader(dataset, model.config)) as loader, ThreadPoolExecutor(2) as pool, bar:
        for collated in loader.read(range(len(loader))):
            failed = {error.video_id: f"{error.path}: {error.reason}" for error in collated.failures}
            if collated.videos is None:
                yield Batch([], np.empty((0, model.width), np.float32), failed)
                continue
            vectors, weighed = _embedded(model, collated)
            of_batch = [by_id[name] for name in collated.videos.video_ids]
            videos = list(pool.map(lambda row: _video(source, thumbs, *row), zip(of_batch, weighed, strict=True)))
            good = [row for row, video in enumerate(videos) if isinstance(video, dict)]
            failed |= {error.video_id: error.reason for error in videos if isinstance(error, FrameError)}
            yield Batch([video for video in videos if isinstance(video, dict)], vectors[good], failed)
            bar.update(len(of_batch))


def _embedded(model: Retriever, collated: Collated) -> tuple[NDArray[np.float32], list[Weighed]]:
    assert collated.videos is not None
    try:
        vectors, weighed = model.embed(collated.videos)
    except (RuntimeError, MemoryError) as error:
        if explained := explain_out_of_memory_in_evaluation(error, model.config, model.device):
            raise explained from error
        raise
    if not vectors.isfinite().all():
        raise UserError(f"{model.source}: its vectors are not finite; the weights have probably diverged")
    return vectors.numpy(), weighed


def _video(source: Source, thumbs: Path, clip: Clip, weighed: Weighed) -> Video | FrameError:
    try:
        duration, times = source.times(clip, weighed.frames)
    except FrameError as error:
        return error
    frames = [
        {"index": index, "time": shown, "weight": round(weight, 6)}
        for index, shown, weight in zip(weighed.frames, times, weighed.weights, strict=True)
    ]
    return {
        "id": clip.id,
        "path": str(clip.path),
        "size": clip.stamp.size,
        "mtime_ns": clip.stamp.mtime_ns,
        "duration": duration,
        "captions": list(clip.captions),
        "frames": frames,
        "best": weighed.best,
        "thumb": write_thumbnail(thumbs, source.store, clip, weighed.frames[weighed.best]),
    }
