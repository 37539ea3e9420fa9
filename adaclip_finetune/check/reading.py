"""How long reading takes: a few real training videos, by the loader of a run with its num_workers."""

from __future__ import annotations

import time
from collections.abc import Sequence

from adaclip_finetune.config import Config
from adaclip_finetune.data.dataset import TrainDataset, VideoReader
from adaclip_finetune.data.frames import FrameStore
from adaclip_finetune.data.loader import make_loader, stop_workers
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.data.queries import TrainEntry

_VIDEOS = 48
_SECONDS = 8.0


def seconds_a_video(video_ids: Sequence[str], store: FrameStore, config: Config, image: ImageSpec) -> float | None:
    """With all readers at work; None for too few videos to tell."""
    chosen = evenly(video_ids, _VIDEOS)
    dataset = TrainDataset([TrainEntry(video_id, ("",)) for video_id in chosen], VideoReader(store, config, image))
    loader = make_loader(dataset, config, [[(0, index)] for index in range(len(chosen))])
    # The first video of each reader takes its start with it.
    warm_up = max(1, config.num_workers)
    begun = started = time.monotonic()
    read = 0
    try:
        for number, _ in enumerate(loader, start=1):
            now = time.monotonic()
            if number == warm_up:
                started = now
            read = max(0, number - warm_up)
            if read >= warm_up and now - begun > _SECONDS:
                break
        return (time.monotonic() - started) / read if read else None
    finally:
        stop_workers(loader)


def evenly(names: Sequence[str], at_most: int) -> list[str]:
    """Some of the names, from the whole of the list, the same ones each time."""
    if len(names) <= at_most:
        return list(names)
    return [names[len(names) * number // at_most] for number in range(at_most)]
