"""How long reading takes: a few real training videos, by the loader of a run with its num_workers."""

from __future__ import annotations

import time
from collections.abc import Sequence

from adaclip_finetune.config import Config
from adaclip_finetune.data.dataset import TrainDataset, VideoReader
from adaclip_finetune.data.frame_store import FrameStore
from adaclip_finetune.data.loader import make_loader, stop_workers
from adaclip_finetune.data.preprocess import Views
from adaclip_finetune.data.queries import TrainEntry

_VIDEOS = 48  # for each reader at least three
_SECONDS = 8.0


def seconds_a_video(video_ids: Sequence[str], store: FrameStore, config: Config, views: Views) -> float:
    """With all readers at work; where there are too few videos to tell, their first ones count, too."""
    readers = max(1, config.num_workers)
    chosen = evenly(video_ids, max(_VIDEOS, 3 * readers))
    dataset = TrainDataset([TrainEntry(video_id, ("",)) for video_id in chosen], VideoReader(store, config, views))
    loader = make_loader(dataset, config, [[(0, index)] for index in range(len(chosen))])
    arrived = []
    try:
        batches = iter(loader)  # starts the processes
        begun = time.monotonic()
        for _ in batches:
            arrived.append(time.monotonic())
            if arrived[-1] - begun > _SECONDS:
                break
        # The first video of each reader takes a part of its start with it.
        warm = len(arrived) >= 2 * readers
        read, started = (len(arrived) - readers, arrived[readers - 1]) if warm else (len(arrived), begun)
        return (arrived[-1] - started) / read
    finally:
        stop_workers(loader)


def evenly(names: Sequence[str], at_most: int) -> list[str]:
    """Some of the names, from the whole of the list, the same ones each time."""
    if len(names) <= at_most:
        return list(names)
    return [names[len(names) * number // at_most] for number in range(at_most)]
