"""The base of objectives, and the group of processes that share a batch.

A new objective is one file beside this one, a settings class and a line in `config/choices.py`; docs/extending.md shows
a complete one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from adaclip_finetune.config import ChoiceSettings
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.processes import rank, world_size


class Group:
    """The processes that share a batch.

    `video_ids` lists the videos of each process's share. Gathered rows are in the order of the processes.
    """

    def __init__(self, video_ids: Sequence[Sequence[str]]) -> None:
        self.shares = video_ids
        self.sizes = [len(ids) for ids in video_ids]
        numbers = {name: number for number, name in enumerate(name for ids in video_ids for name in ids)}
        self._videos = [numbers[name] for ids in video_ids for name in ids]

    def __len__(self) -> int:
        """Return B, the number of pairs of the batch in all processes together."""
        return len(self._videos)

    @property
    def here(self) -> slice:
        """The gathered rows that belong to this process."""
        start = sum(self.sizes[: rank()]) if len(self.sizes) > 1 else 0
        return slice(start, start + self.own)

    @property
    def own(self) -> int:
        """The number of pairs of this process. If it is 0, the process's batch has one blank row."""
        return self.sizes[rank() if len(self.sizes) > 1 else 0]

    def videos(self, device: torch.device) -> Tensor:
        """Return a number for each pair's video, equal for captions of one video: int64 (B,)."""
        return torch.tensor(self._videos, device=device)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes (B, …), given this process's rows (n, …).

        Gradients of all processes' losses flow back to the process that computed a row.
        """
        rows = rows[: self.own]
        if len(self.sizes) == 1:
            return rows
        gathered: Tensor = _GatherRows.apply(rows, self.sizes)
        return gathered

    def share_of_sum(self, part: Tensor) -> Tensor:
        """Return a loss that is a sum over processes, given this process's part of it.

        Its value is the whole sum. Its gradients are scaled so that their mean over processes, which
        DistributedDataParallel computes, is the gradient of the sum.
        """
        if len(self.sizes) == 1:
            return part
        whole = part.detach().clone()
        dist.all_reduce(whole)
        scaled = part * len(self.sizes)
        return scaled + (whole - scaled.detach())


class Objective(nn.Module, ABC):
    """Computes the loss of a training batch; DistributedDataParallel wraps it.

    Everything that learns is used within `forward`, so that the wrapper sees it. An objective's own parameters are new
    and always learn.
    """

    settings_class: type[ChoiceSettings]

    def __init__(self, settings: ChoiceSettings, retriever: VideoRetriever) -> None:
        super().__init__()
        self.settings, self.retriever = settings, retriever

    def choose(self) -> None:
        """Set `requires_grad` of what the objective created within CLIP. Called after the finetuning method chose."""

    def own_state(self) -> dict[str, Tensor]:
        """Return the objective's own tensors, without those of the retriever."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("retriever.")}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `own_state` returned."""
        self.load_state_dict(dict(state), strict=False)

    @abstractmethod
    def forward(self, batch: TrainBatch, group: Group) -> dict[str, Tensor]:
        """Return named terms whose sum is the loss of the whole batch in all processes.

        `batch` is this process's share. The terms are float32 even under autocast.
        """


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        # Shares differ by a row at most, and all_gather needs equal shapes.
        padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])]).contiguous()
        parts = [torch.empty_like(padded) for _ in range(world_size())]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        start = sum(ctx.sizes[: rank()])
        return summed[start : start + ctx.sizes[rank()]], None
