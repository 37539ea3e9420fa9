"""What an objective is, and the batch of several processes as one.

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
    """The processes that work on one batch, each on a share of it.

    `video_ids` names the videos of each process's share. Gathered rows are in the order of the processes.
    """

    def __init__(self, video_ids: Sequence[Sequence[str]]) -> None:
        self.shares = video_ids
        self.sizes = [len(ids) for ids in video_ids]
        numbers = {name: number for number, name in enumerate(name for ids in video_ids for name in ids)}
        self._videos = [numbers[name] for ids in video_ids for name in ids]

    def __len__(self) -> int:
        """B, the pairs of the batch in all processes together."""
        return len(self._videos)

    @property
    def here(self) -> slice:
        """Which of the gathered rows are this process's."""
        start = sum(self.sizes[: rank()]) if len(self.sizes) > 1 else 0
        return slice(start, start + self.own)

    @property
    def own(self) -> int:
        """How many pairs this process has. Its batch may hold one blank row more, if that is none."""
        return self.sizes[rank() if len(self.sizes) > 1 else 0]

    def videos(self, device: torch.device) -> Tensor:
        """A number for each pair's video, equal for captions of one video: int64 (B,)."""
        return torch.tensor(self._videos, device=device)

    def gather(self, rows: Tensor) -> Tensor:
        """This process's rows (n, …) → the rows of all processes (B, …), with gradients: what any process's loss asks
        of a row reaches the process that made it."""
        rows = rows[: self.own]
        if len(self.sizes) == 1:
            return rows
        gathered: Tensor = _GatherRows.apply(rows, self.sizes)
        return gathered

    def share_of_sum(self, part: Tensor) -> Tensor:
        """A loss that is a sum over processes, from this process's part of it: its value is the whole sum, and its
        gradients are such that the mean over processes, which DistributedDataParallel takes, is that of the sum."""
        if len(self.sizes) == 1:
            return part
        whole = part.detach().clone()
        dist.all_reduce(whole)
        scaled = part * len(self.sizes)
        return scaled + (whole - scaled.detach())


class Objective(nn.Module, ABC):
    """What a training step computes and goes back through, and what DistributedDataParallel wraps.

    Everything that learns takes part within `forward`, so that a wrapper sees it. Parameters of an objective's own are
    new and always learn.
    """

    settings_class: type[ChoiceSettings]

    def __init__(self, settings: ChoiceSettings, retriever: VideoRetriever) -> None:
        super().__init__()
        self.settings, self.retriever = settings, retriever

    def choose(self) -> None:
        """Let learn what the objective created within CLIP. Called after the method chose among CLIP's parameters."""

    def own_state(self) -> dict[str, Tensor]:
        """The tensors of the objective's own, without the retriever."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("retriever.")}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """What `own_state` gave."""
        self.load_state_dict(dict(state), strict=False)

    @abstractmethod
    def forward(self, batch: TrainBatch, group: Group) -> dict[str, Tensor]:
        """`batch` is this process's share. Named scalars, whose sum is the loss of the whole batch in all processes;
        float32 whatever autocast says."""


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        # Shares differ by a row or so, and gathering wants them alike.
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
