"""Training batches whose videos are already on the device: the next is copied while the current one is worked on."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from adaclip_finetune.data.dataset import TrainBatch

_WITH_STREAMS = ("cuda", "xpu")


def prefetched(batches: Iterable[TrainBatch], device: torch.device) -> Iterator[TrainBatch]:
    """The batches in their order, each with its videos on `device` (token ids and noise stay on the CPU).

    On CUDA and XPU one batch is read ahead and copied on a stream of its own, which needs page-locked memory (pin_mem)
    to go on beside the computation; elsewhere nothing is read ahead. A generator given as `batches` is closed with this
    one.
    """
    ready = _copied_ahead(iter(batches), device) if device.type in _WITH_STREAMS else _copied(batches, device)
    try:
        yield from ready
    finally:
        if isinstance(batches, Generator):
            batches.close()


def _copied(batches: Iterable[TrainBatch], device: torch.device) -> Iterator[TrainBatch]:
    for batch in batches:
        yield batch.to(device)


def _copied_ahead(batches: Iterator[TrainBatch], device: torch.device) -> Iterator[TrainBatch]:
    backend = getattr(torch, device.type)
    stream = backend.Stream(device)
    coming = _start_copy(next(batches, None), device, backend, stream)
    while coming is not None:
        batch, copied = coming
        # The next one is on its way before this one is handed out: that is the overlap.
        coming = _start_copy(next(batches, None), device, backend, stream)
        current = backend.current_stream(device)
        current.wait_event(copied)
        for tensor in _tensors(batch):
            # Made on the copying stream: without this its memory would be given away while the current one still reads.
            tensor.record_stream(current)
        yield batch


def _start_copy(
    batch: TrainBatch | None, device: torch.device, backend: Any, stream: Any
) -> tuple[TrainBatch, Any] | None:
    """The batch as it will be on the device, and the event that its copy is complete."""
    if batch is None:
        return None
    with backend.stream(stream):
        there = batch.to(device, non_blocking=True)
    return there, stream.record_event()


def _tensors(batch: TrainBatch) -> list[Tensor]:
    videos = batch.videos
    given = (videos.frames, videos.frame_mask, videos.policy_frames, videos.frame_indices)
    return [tensor for tensor in given if tensor is not None]
