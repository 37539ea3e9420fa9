"""The base of objectives, and the group of processes that share a batch.

A new objective is one file beside this one, a settings class and a line in `config/choices/`; docs/extending.md shows
a complete one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from adaclip_finetune.config import ChoiceSettings, Config
from adaclip_finetune.data.annotations import folded
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.data.preprocess import Views
from adaclip_finetune.model.features import at_least_float32
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.processes import rank, world_size
from adaclip_finetune.weights.loaded import LoadedClip

Rows = dict[str, Tensor]
"""Tensors by name, each with one row for every pair of a batch or of a part of it."""


class Group:
    """The processes that share a batch.

    `shares` lists the videos and captions of each process's share. Gathered rows are in the order of the processes.
    """

    def __init__(self, shares: Sequence[Sequence[tuple[str, str]]]) -> None:
        self.sizes = [len(pairs) for pairs in shares]
        pairs = [pair for share in shares for pair in share]
        self.video_ids = [video for video, _ in pairs]
        self._videos = _numbered(self.video_ids)
        self._captions = _numbered([folded(caption) for _, caption in pairs])

    def __len__(self) -> int:
        """Return B, the number of pairs of the batch in all processes together."""
        return len(self.video_ids)

    @property
    def here(self) -> slice:
        """The gathered rows that belong to this process."""
        start = sum(self.sizes[: rank()]) if len(self.sizes) > 1 else 0
        return slice(start, start + self.own)

    @property
    def own(self) -> int:
        """The number of pairs of this process. If it is 0, the process's batch has one blank row."""
        return self.sizes[rank() if len(self.sizes) > 1 else 0]

    def same(self, device: torch.device) -> Tensor:
        """Return which pairs have the same video or the same caption, and are no negatives of each other: bool (B, B).

        Differences of case and spaces do not make another caption.
        """
        same = torch.zeros(len(self), len(self), dtype=torch.bool)
        for numbers in (torch.tensor(self._videos), torch.tensor(self._captions)):
            same |= numbers[:, None] == numbers[None, :]
        return same.to(device)

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


class Opened(NamedTuple):
    """A model beside the one that learns: its settings, its CLIP, and the retriever, in evaluation mode.

    `plain`: it is a pretrained CLIP alone, without a selector or a pooling that has learned.
    """

    config: Config
    loaded: LoadedClip
    retriever: VideoRetriever
    plain: bool = False


class Objective(nn.Module, ABC):
    """Computes the loss of a training batch; DistributedDataParallel wraps it.

    Everything that learns is used within `forward`, so that the wrapper sees it. An objective's own parameters are new
    and always learn.
    """

    settings_class: type[ChoiceSettings]
    second_of_labelled: ClassVar[bool] = True
    """Whether `second_view` is needed of labelled videos; if not, they are read once."""

    def __init__(self, settings: ChoiceSettings, retriever: VideoRetriever) -> None:
        super().__init__()
        self.settings, self.retriever = settings, retriever

    def choose(self) -> None:
        """Set `requires_grad` of what the objective created within CLIP. Called after the finetuning method chose."""

    def start(self, config: Config, loaded: LoadedClip, open_other: Callable[[str], Opened]) -> None:
        """Prepare what training needs besides the retriever, whose weights are those that the run starts from.

        `loaded` is the retriever's CLIP. `open_other(source)` opens a run folder, a checkpoint or a CLIP. By default
        nothing is prepared. Raise UserError for what the settings name and is not there, or is not what it should be.
        """

    def second_view(self, config: Config) -> tuple[Config, Views] | None:
        """Return with which settings and how prepared each training video is read once more, as `TrainBatch.second`.

        By default, and if None is returned, it is not.
        """
        return None

    def frozen_weights(self) -> Iterable[Tensor]:
        """Return the weights of models that are not part of this module and through which gradients pass."""
        return ()

    def own_state(self) -> dict[str, Tensor]:
        """Return the objective's own tensors, without those of the retriever."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("retriever.")}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `own_state` returned."""
        self.load_state_dict(dict(state), strict=False)

    def forward(
        self, batch: TrainBatch, group: Group, before: Rows | None = None, gradients: Rows | None = None
    ) -> dict[str, Tensor]:
        """Return named terms whose sum is the loss of the whole batch in all processes.

        `batch` is this process's share. For gradient caching it is a part of the share: the last part is given with the
        rows `before` it, and every other with the `gradients` of the loss with respect to its rows; the term of such a
        part has the gradients that the part contributes to those of the loss.
        """
        rows = self.embed(batch)
        if gradients is not None:
            return {"part": sum((rows[name] * gradients[name]).sum() for name in gradients)}  # type: ignore[dict-item]
        if before is None:
            return self.loss(rows | self.embed_fixed(batch), group)
        joined = {name: torch.cat([before[name], rows[name]]) for name in rows}
        return self.loss(before | joined, group)

    def embed(self, batch: TrainBatch) -> Rows:
        """Return what the loss needs of each pair, with gradients, in float32 or float64.

        A row depends on its own pair alone. By default these are the vector of the text, `text`, and what the scorer
        keeps of the video, `video`.
        """
        text, videos = self.retriever(batch)
        return {"text": at_least_float32(text.sentence), "video": self.retriever.scorer.keep(videos)}

    def embed_fixed(self, batch: TrainBatch) -> Rows:
        """Return what the loss needs of each pair without gradients, such as a teacher's vectors; by default nothing.

        Gradient caching computes these rows once, and those of `embed` twice.
        """
        return {}

    @abstractmethod
    def loss(self, rows: Rows, group: Group) -> dict[str, Tensor]:
        """Return named terms, whose sum is the loss of the whole batch, from all rows of this process's share.

        The terms are float32 (float64 for float64 rows) even under autocast.
        """


def _numbered(names: Sequence[str]) -> list[int]:
    """Return a number for each name, equal for equal names."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


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
