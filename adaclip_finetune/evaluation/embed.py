"""Embed numbered batches, shared out among all processes, and collect their rows on the main one.

Batches, and so rows, are the same bit for bit with any number of processes. In each round every process embeds one
batch, and the main process collects and keeps them all; a kill loses the batches of one round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.parts import PartFolder
from adaclip_finetune.processes import from_main, gather_objects, is_main, rank, world_size

T = TypeVar("T")


@dataclass(frozen=True)
class EmbeddedBatch:
    """A batch of items, embedded, on the CPU."""

    places: Tensor  # int64 (n,), the number of each row's item
    rows: Tensor  # float32 (n, …)
    usage: Tensor  # int64 (N,), how often each candidate frame was chosen; (0,) if no frames are chosen
    failed: dict[str, str] = field(default_factory=dict)  # unreadable video → reason


Work = Callable[[Sequence[int]], Iterator[EmbeddedBatch]]
"""Embeds the batches with these numbers, in this order."""


class Embeddings:
    """The embeddings of `count` items. Rows are on the main process only."""

    def __init__(self, kind: str, count: int, folder: PartFolder | None, keep_failures: bool = True) -> None:
        """`folder`, of the main process, keeps the batches, named after `kind`. Without `keep_failures` it does not
        keep those with unreadable videos, so that they are read again once they were repaired."""
        self.kind, self.count, self.folder, self.keep_failures = kind, count, folder, keep_failures
        self.failed: dict[str, str] = {}
        self.usage = torch.zeros(0, dtype=torch.int64)
        self._rows = torch.empty(0)
        self._embedded = torch.zeros(count, dtype=torch.bool)

    def embed(self, num_batches: int, work: Work, label: str) -> None:
        """Embed all batches that were not kept earlier. Afterwards all processes know `failed` and `usage`."""
        hidden = None if is_main() else True  # the main process shows a bar, but only on a terminal
        with tqdm(total=self.count, desc=label, unit=self.kind, leave=False, disable=hidden) as bar:
            todo = on_main(partial(self._take_kept, num_batches, bar))
            batches = work(todo[rank() :: world_size()])
            for start in range(0, len(todo), world_size()):
                numbers = todo[start : start + world_size()]
                mine = next(batches) if rank() < len(numbers) else None
                on_main(partial(self._take_round, numbers, gather_objects(mine), bar))
        self.failed, self.usage = from_main((self.failed, self.usage))

    def rows(self) -> Tensor:
        """Return float32 (n, …) of the n items that did not fail, in their order."""
        return self._rows if self._embedded.all() else self._rows[self._embedded]

    def _take_kept(self, num_batches: int, bar: tqdm[object]) -> list[int]:
        """Take the batches that were kept, and return the numbers of the others."""
        missing = []
        for number in range(num_batches):
            if self.folder and (kept := self.folder.read(f"{self.kind}-{number:06d}")):
                tensors, values = kept
                self._take(EmbeddedBatch(**tensors, failed=values["failed"]), bar)
            else:
                missing.append(number)
        return missing

    def _take_round(self, numbers: list[int], batches: list[EmbeddedBatch | None], bar: tqdm[object]) -> None:
        for number, batch in zip(numbers, batches, strict=False):
            assert batch is not None, "only the last processes have no batch in the last round"
            if self.folder and (self.keep_failures or not batch.failed):
                tensors = {"places": batch.places, "rows": batch.rows, "usage": batch.usage}
                self.folder.write(f"{self.kind}-{number:06d}", tensors, {"failed": batch.failed})
            self._take(batch, bar)

    def _take(self, batch: EmbeddedBatch, bar: tqdm[object]) -> None:
        if len(batch.places):
            if not len(self._rows):
                # Allocated once: concatenating all batches at the end would need twice the memory.
                self._rows = batch.rows.new_empty(self.count, *batch.rows.shape[1:])
                self.usage = torch.zeros_like(batch.usage)
            self._rows[batch.places] = batch.rows
            self._embedded[batch.places] = True
            self.usage += batch.usage
        self.failed |= batch.failed
        bar.update(len(batch.places) + len(batch.failed))


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on the main process and return its result on all of them. An error there is raised on all."""
    value, error = None, None
    if is_main():
        try:
            value = action()
        except Exception as caught:
            error = caught
    failure = None if error is None else (isinstance(error, UserError), str(error))
    value, failure = from_main((value, failure))
    if error is not None:
        raise error
    if failure is not None:
        for_the_user, message = failure
        raise UserError(message) if for_the_user else RuntimeError(f"the main process failed: {message}")
    return cast(T, value)
