"""The gradients of one batch, all at once or part by part (gradient caching, Gao et al. 2021).

With `grad_cache_chunk` the rows of the batch are computed first without a graph, so that the loss and its gradients
with respect to the rows are known. Then each part is computed again with a graph, through which the gradients of its
rows go back. Memory is that of a part, and the gradients are those of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from accelerate import Accelerator
from torch import Tensor

from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.errors import NotFinite
from adaclip_finetune.objectives.base import Group, Objective, Rows


class Backward:
    """Adds the gradients of batches to those of the parameters."""

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        wrapped: Callable[..., dict[str, Tensor]],
        chunk: int,
        pinned: bool = False,
    ) -> None:
        """`wrapped` is the objective, wrapped for mixed precision and several processes.

        `chunk` is the largest number of pairs that a process computes at a time (0: all). Copies from `pinned` memory
        do not wait.
        """
        self.accelerator, self.objective, self.wrapped = accelerator, objective, wrapped
        self.chunk, self.pinned = chunk, pinned

    def __call__(
        self, batch: TrainBatch, group: Group, seeds: Callable[[int], int], share: float = 1.0
    ) -> dict[str, float]:
        """Add the gradients of `share` times the loss of a batch, and return that part of each term of the loss.

        `seeds(number)` is the seed of what the towers draw by themselves (dropout) in part `number`. Processes exchange
        gradients, if at all, with the last part only. Raise NotFinite if the loss is not; then the
        gradients are of no use.
        """
        if not self.chunk or max(group.sizes) <= self.chunk:
            torch.manual_seed(seeds(0))
            return self._backward(self.wrapped(self._there(batch), group), share)
        parts = [batch.rows(start, start + self.chunk) for start in range(0, len(batch), self.chunk)] or [batch]
        learned, fixed = self._rows(parts, seeds)
        gradients = self._gradients(learned, fixed, group)
        ends = list(accumulate(map(len, parts)))
        for number, (part, end) in enumerate(zip(parts[:-1], ends, strict=False)):
            torch.manual_seed(seeds(number))
            own = {name: gradient[end - len(part) : end] for name, gradient in gradients.items()}
            with self.accelerator.no_sync(self.wrapped):
                term = self.wrapped(self._there(part), group, gradients=own)["part"]
                self.accelerator.backward(term * share)
        torch.manual_seed(seeds(len(parts) - 1))
        before = {name: tensor[: len(batch) - len(parts[-1])] for name, tensor in learned.items()}
        return self._backward(self.wrapped(self._there(parts[-1]), group, before=before | fixed), share)

    def _backward(self, terms: dict[str, Tensor], share: float) -> dict[str, float]:
        self.accelerator.backward(_summed(terms) * share)
        # Only now, since reading a value waits until the device has computed it.
        _check_finite(terms)
        return {name: float(term.item()) * share for name, term in terms.items()}

    @torch.no_grad()
    def _rows(self, parts: Sequence[TrainBatch], seeds: Callable[[int], int]) -> tuple[Rows, Rows]:
        """Return the rows of all parts, those that learn and the others. Batch statistics stay as they are."""
        buffers = [(buffer, buffer.clone()) for buffer in self.objective.buffers()]
        learned, fixed = [], []
        for number, part in enumerate(parts):
            torch.manual_seed(seeds(number))
            there = self._there(part)
            with self.accelerator.autocast():
                learned.append(self.objective.embed(there))
                fixed.append(self.objective.embed_fixed(there))
        for buffer, value in buffers:
            buffer.copy_(value)
        return _joined(learned), _joined(fixed)

    def _gradients(self, learned: Rows, fixed: Rows, group: Group) -> Rows:
        """Return the gradients of the loss with respect to the rows that learn."""
        for rows in learned.values():
            rows.requires_grad_()
        with self.accelerator.autocast():
            terms = self.objective.loss(learned | fixed, group)
        _check_finite(terms)
        loss = _summed(terms)
        found = torch.autograd.grad(loss, list(learned.values()), materialize_grads=True)
        for rows in learned.values():
            rows.requires_grad_(False)
        return dict(zip(learned, found, strict=True))

    def _there(self, batch: TrainBatch) -> TrainBatch:
        return batch.to(self.accelerator.device, non_blocking=self.pinned)


def _summed(terms: dict[str, Tensor]) -> Tensor:
    """Return the loss, the sum of its terms."""
    return sum(terms.values(), torch.zeros((), device=next(iter(terms.values())).device))


def _check_finite(terms: dict[str, Tensor]) -> None:
    """Raise NotFinite if the loss is not a number, or infinite."""
    if not math.isfinite(value := float(_summed(terms).item())):
        raise NotFinite(f"the loss became {value}")


def _joined(parts: Sequence[Rows]) -> Rows:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
