"""A batch that is spread over processes, as one: gathered with gradients.

The contrastive loss needs every pair of the batch, wherever it was encoded. Each process computes the whole loss; the
gradient of what it gathered is summed over the processes, and DistributedDataParallel's mean over them brings each
parameter the gradient that one process would have given it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.processes import rank, world_size


class PairSimilarity(nn.Module):
    """The similarity matrix (B, B) of a batch of B pairs, of all processes together: what a training step goes back
    through. Everything that learns takes part within `forward`, so that a wrapper sees it."""

    def __init__(self, retriever: VideoRetriever) -> None:
        super().__init__()
        self.retriever = retriever

    def forward(self, batch: TrainBatch, sizes: list[int], k: int, temperature: float) -> Tensor:
        """`sizes`: how many pairs each process has; they add up to B. `batch` is this process's share."""
        device = self.retriever.logit_scale().device
        noise = batch.noise.to(device, non_blocking=True)
        text, video = self.retriever(batch.videos, batch.token_ids, k, temperature, noise)
        if len(sizes) > 1:
            # A share may be empty: its blank row goes through the towers, so that every process calls for the same
            # gradients, and is dropped here.
            here = sizes[rank()]
            frames = video.frames if video.video is None else video.video
            together = gather_rows(torch.cat([text[:here], frames[:here].flatten(1)], dim=1), sizes)
            text, flat = together[:, : text.shape[1]], together[:, text.shape[1] :]
            frames = flat.reshape(-1, *frames.shape[1:])
            video = video._replace(frames=frames) if video.video is None else video._replace(video=frames)
        return self.retriever.similarity(text, video)


def gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """Rows (sizes[rank], D) of every process, one below the other: (sum of sizes, D), with gradients for each."""
    gathered: Tensor = _GatherRows.apply(rows, sizes)
    return gathered


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        # Shares differ by a row or so, and gathering wants them alike.
        padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), rows.shape[1])]).contiguous()
        parts = [torch.empty_like(padded) for _ in range(world_size())]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        start = sum(ctx.sizes[: rank()])
        return summed[start : start + ctx.sizes[rank()]], None
