"""Load batches in an order that depends on (seed, epoch) alone, ahead of time in worker processes.

`epoch_batches` plans a whole epoch: a run that resumes in the middle of one starts later in the same list, and several
processes take shares of each batch.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from adaclip_finetune.config import Config
from adaclip_finetune.data.blank import blank_videos
from adaclip_finetune.data.dataset import (
    Collated,
    GalleryDataset,
    TrainBatch,
    TrainDataset,
    VideoBatch,
    VideoReader,
    collate,
)
from adaclip_finetune.data.readable import UnreadableVideos, listing
from adaclip_finetune.data.sampling import generator
from adaclip_finetune.processes import gather_objects, rank, world_size

_OUTLIVES_SIGTERM = 30  # seconds
FRAMES_A_GALLERY_BATCH = 512  # 77 MB of pixels at 224 x 224, of which each worker holds a few batches


def epoch_batches(num_entries: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the shuffled entries of an epoch in ceil(num_entries / batch_size) batches, each entry once.

    The last batch may be smaller, but never a single entry, whose contrastive loss has nothing to compare with: such an
    entry takes one from the batch before it, or joins that batch if it has only two.
    """
    order = generator("shuffle", seed, epoch).permutation(num_entries).tolist()
    starts = list(range(0, num_entries, batch_size))
    if len(starts) > 1 and num_entries - starts[-1] == 1 and batch_size > 1:
        if batch_size > 2:
            starts[-1] -= 1
        else:
            starts.pop()
    return [order[start:end] for start, end in zip(starts, [*starts[1:], num_entries], strict=True)]


def updates_per_epoch(num_entries: int, batch_size: int, gradient_accumulation_steps: int) -> int:
    """Return the optimizer steps per epoch: ceil(batches / gradient_accumulation_steps)."""
    return math.ceil(len(epoch_batches(num_entries, batch_size, seed=0, epoch=0)) / gradient_accumulation_steps)


class TrainLoader:
    """Training batches, of each the share of this process.

    A video that cannot be read is left out of its batch and never replaced by another; `failed` holds the reasons.
    """

    def __init__(self, dataset: TrainDataset, config: Config, tokenize: Callable[[Sequence[str], int], Tensor]) -> None:
        """tokenize(texts, max_len) returns token ids, int64 (n, max_len)."""
        self.dataset, self.config, self.tokenize = dataset, config, tokenize
        self.failed: dict[str, str] = {}
        self._plan: list[list[tuple[int, int]]] = []  # the loader reads the list when an iteration starts
        self._loader = make_loader(dataset, config, self._plan)

    def epoch(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[TrainBatch]:
        """Yield this process's shares of the batches of an epoch, from batch number `start` on."""
        batches = epoch_batches(len(self.dataset), batch_size, self.dataset.seed, epoch)
        self._plan[:] = [[(epoch, index) for index in _share(batch)] for batch in batches[start:]]
        for collated in self._loader:
            self.failed |= {error.video_id: f"{error.path}: {error.reason}" for error in collated.failures}
            yield self._batch(collated)

    def take_failed(self) -> dict[str, str]:
        """Return the videos that failed since the last call, in all processes, with reasons. All must call it."""
        failed, self.failed = self.failed, {}
        return {video: reason for part in gather_objects(failed) for video, reason in part.items()}

    def close(self) -> None:
        """End the reading processes."""
        stop_workers(self._loader)

    def _batch(self, collated: Collated) -> TrainBatch:
        if collated.videos is None or collated.noise is None:
            reader, again = self.dataset.reader, self.dataset.second
            tokens, noise = self.tokenize([""], self.config.max_txt_len), torch.zeros(1, self.config.num_frm)
            second = _no_video(again) if again else None
            return self._with_auxiliary(TrainBatch(_no_video(reader), [], tokens, noise, second), [""])
        tokens = self.tokenize(collated.texts, self.config.max_txt_len)
        batch = TrainBatch(collated.videos, collated.texts, tokens, collated.noise, collated.second)
        return self._with_auxiliary(batch, collated.auxiliary)

    def _with_auxiliary(self, batch: TrainBatch, captions: list[str]) -> TrainBatch:
        """Return the batch with these auxiliary captions, "" for none, if the objective uses them."""
        if not self.config.uses_auxiliary:
            return batch
        ids = self.tokenize(captions, self.config.max_txt_len)
        return replace(batch, auxiliary_ids=ids, has_auxiliary=torch.tensor([caption != "" for caption in captions]))


def _no_video(reader: VideoReader) -> VideoBatch:
    """Return a blank row as `reader` would read it, without a name."""
    return replace(blank_videos(reader.config.num_frm, reader.views, 1), video_ids=[])


def nothing_readable(failed: Mapping[str, str]) -> UnreadableVideos:
    """Return the error for a training batch of which no video could be read."""
    return UnreadableVideos(
        f"nothing of a training batch could be read:\n{listing(failed)}\n"
        "Check whether the videos are still there; replace them, or remove them from the annotation",
        failed,
    )


def _share(batch: list[int]) -> list[int]:
    """Return the entries of a batch that this process reads. Shares differ by at most one entry.

    The main process's share, whose batch statistics are kept, is never empty.
    """
    size, here = len(batch), rank()
    start, end = (-(-size * number // world_size()) for number in (here, here + 1))
    return batch[start:end]


class GalleryLoader:
    """The videos of an evaluation in numbered batches, in the order of the annotation.

    The content of a batch does not depend on which process reads it, or which other batches are read.
    """

    def __init__(self, dataset: GalleryDataset, config: Config) -> None:
        size = max(1, min(config.val_batch_size, FRAMES_A_GALLERY_BATCH // config.num_frm))
        indices = range(len(dataset))
        self._batches = [list(indices[start : start + size]) for start in indices[::size]]
        self._asked: list[list[int]] = []
        self._loader = make_loader(dataset, config, self._asked)

    def close(self) -> None:
        """End the reading processes."""
        stop_workers(self._loader)

    def __len__(self) -> int:
        return len(self._batches)

    def read(self, numbers: Iterable[int]) -> Iterator[Collated]:
        """Yield the batches with these numbers, in this order, each with the errors of its unreadable videos."""
        self._asked[:] = [self._batches[number] for number in numbers]
        if self._asked:
            yield from self._loader


def make_loader(dataset: Any, config: Config, batches: Sequence[Any]) -> DataLoader[Collated]:
    """Return a torch loader of `batches` (lists of the dataset's keys). Its workers live until `stop_workers`."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=config.num_workers,
        collate_fn=collate,
        pin_memory=config.pin_mem and torch.accelerator.is_available(),
        persistent_workers=config.num_workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the loader's own draws must not move the model's random state
    )


def stop_workers(loader: DataLoader[Collated]) -> None:
    """End the loader's worker processes. If the garbage collector did it, torch would wait five seconds for each."""
    iterator = loader._iterator
    if iterator is not None:
        loader._iterator = None
        iterator._shutdown_workers()  # type: ignore[attr-defined]


def _start_worker(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process, which finishes its step with what the workers have read.

    Schedulers send SIGTERM to every process: a worker survives it for a while, but not forever, since Python also uses
    it to end workers that were not closed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_OUTLIVES_SIGTERM))
    torch.set_num_threads(1)
