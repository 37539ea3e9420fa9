"""Load batches ahead of time in worker processes, in the order that a `BatchPlan` gives or that is asked for.

A run that resumes in the middle of an epoch starts later in the same plan, and several processes take shares of each
batch.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from adaclip_finetune.config import Config
from adaclip_finetune.data.batches import BatchPlan
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
from adaclip_finetune.processes import gather_objects

_OUTLIVES_SIGTERM = 30  # seconds
FRAMES_A_GALLERY_BATCH = 512  # 77 MB of pixels at 224 x 224, of which each worker holds a few batches


class TrainLoader:
    """Training batches, of each the share of this process.

    A video that cannot be read is left out of its batch and never replaced by another; `failed` holds the reasons.
    """

    def __init__(
        self,
        dataset: TrainDataset,
        config: Config,
        tokenize: Callable[[Sequence[str], int], Tensor],
        plan: BatchPlan | None = None,
    ) -> None:
        """tokenize(texts, max_len) returns token ids, int64 (n, max_len). `plan`: default each entry once an epoch."""
        self.dataset, self.config, self.tokenize = dataset, config, tokenize
        self.plan = plan or BatchPlan((len(dataset),), dataset.seed)
        self.failed: dict[str, str] = {}
        self._asked = _Asked()
        self._loader = make_loader(dataset, config, self._asked)

    def epoch(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[TrainBatch]:
        """Yield this process's shares of the batches of an epoch, from batch number `start` on."""
        batches = self.plan.epoch(epoch, batch_size, start)
        self._asked.batches = ([(epoch, index) for index in self.plan.share(batch)] for batch in batches)
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
            videos, second = _no_video(reader), _no_video(again) if again else None
            blank = TrainBatch(videos, [], tokens, noise, second, torch.ones(1, dtype=torch.bool))
            return self._with_auxiliary(blank, [""])
        tokens, labelled = self.tokenize(collated.prompts, self.config.max_txt_len), torch.tensor(collated.labelled)
        batch = TrainBatch(collated.videos, collated.texts, tokens, collated.noise, collated.second, labelled)
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


class _Asked:
    """The batches that a loader reads next: lists of the dataset's keys. It looks here when an iteration starts."""

    batches: Iterable[list[Any]] = ()

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.batches)


class GalleryLoader:
    """The videos of an evaluation in numbered batches, in the order of the annotation.

    The content of a batch does not depend on which process reads it, or which other batches are read.
    """

    def __init__(self, dataset: GalleryDataset, config: Config) -> None:
        size = max(1, min(config.val_batch_size, FRAMES_A_GALLERY_BATCH // config.num_frm))
        indices = range(len(dataset))
        self._batches = [list(indices[start : start + size]) for start in indices[::size]]
        self._asked = _Asked()
        self._loader = make_loader(dataset, config, self._asked)

    def close(self) -> None:
        """End the reading processes."""
        stop_workers(self._loader)

    def __len__(self) -> int:
        return len(self._batches)

    def read(self, numbers: Iterable[int]) -> Iterator[Collated]:
        """Yield the batches with these numbers, in this order, each with the errors of its unreadable videos."""
        return self.read_videos(self.indices(numbers))

    def indices(self, numbers: Iterable[int]) -> list[list[int]]:
        """Return which videos the batches with these numbers consist of."""
        return [self._batches[number] for number in numbers]

    def read_videos(self, batches: list[list[int]]) -> Iterator[Collated]:
        """Yield these batches, whatever the size of the loader's own, as another loader has them (`indices`)."""
        self._asked.batches = batches
        if batches:
            yield from self._loader


def make_loader(
    dataset: Any, config: Config, batches: Iterable[list[Any]], collated: Callable[[Any], Any] = collate
) -> DataLoader[Any]:
    """Return a torch loader of `batches` (lists of the dataset's keys), which `collated` makes of items. Its workers
    live until `stop_workers`."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=config.num_workers,
        collate_fn=collated,
        pin_memory=config.pin_mem and torch.accelerator.is_available(),
        persistent_workers=config.num_workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the loader's own draws must not move the model's random state
    )


def stop_workers(loader: DataLoader[Any]) -> None:
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
