"""Embed numbered batches, dealt out to all processes, and put their rows together on the main one.

Batches are the same however many processes there are, and so are their rows, bit for bit. In each round every process
embeds one batch, and the main process takes, and keeps, them all: a kill loses the batches of one round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.parts import Part, PartFolder
from adaclip_finetune.processes import from_main, gather_objects, is_main, rank, world_size

T = TypeVar("T")

# Numbers of batches → what they became, in this order.
Work = Callable[[Sequence[int]], Iterator[Part]]


class Embeddings:
    """What `count` items were embedded to. Rows are on the main process only."""

    def __init__(self, kind: str, count: int, folder: PartFolder | None) -> None:
        """`folder` is the main process's; parts in it are named after `kind`."""
        self.kind, self.count, self.folder = kind, count, folder
        self.failed: dict[str, str] = {}
        self.usage = torch.zeros(0, dtype=torch.int64)
        self._rows = torch.empty(0)
        self._embedded = torch.zeros(count, dtype=torch.bool)

    def embed(self, num_batches: int, work: Work, bar: tqdm[object]) -> None:
        """All batches that are not kept from an earlier time. Afterwards all processes know `failed` and `usage`."""
        todo = on_main(partial(self._take_kept, num_batches, bar))
        parts = work(todo[rank() :: world_size()])
        for start in range(0, len(todo), world_size()):
            numbers = todo[start : start + world_size()]
            mine = next(parts) if rank() < len(numbers) else None
            on_main(partial(self._take_round, numbers, gather_objects(mine), bar))
        self.failed, self.usage = from_main((self.failed, self.usage))

    def rows(self) -> Tensor:
        """float32 (n, …) of the n items that did not fail, in their order."""
        return self._rows if self._embedded.all() else self._rows[self._embedded]

    def _take_kept(self, num_batches: int, bar: tqdm[object]) -> list[int]:
        """Returns the numbers of the others."""
        missing = []
        for number in range(num_batches):
            part = self.folder.read(self._name(number)) if self.folder else None
            if part is None:
                missing.append(number)
            else:
                self._take(part, bar)
        return missing

    def _take_round(self, numbers: list[int], parts: list[Part | None], bar: tqdm[object]) -> None:
        for number, part in zip(numbers, parts, strict=False):
            assert part is not None, "processes that come later have less to do"
            if self.folder:
                self.folder.write(self._name(number), part)
            self._take(part, bar)

    def _take(self, part: Part, bar: tqdm[object]) -> None:
        if len(part.places):
            if not len(self._rows):
                # In one piece from the start: parts put together at the end would need the room twice.
                self._rows = part.rows.new_empty(self.count, *part.rows.shape[1:])
                self.usage = torch.zeros_like(part.usage)
            self._rows[part.places] = part.rows
            self._embedded[part.places] = True
            self.usage += part.usage
        self.failed |= part.failed
        bar.update(len(part.places) + len(part.failed))

    def _name(self, number: int) -> str:
        return f"{self.kind}-{number:06d}"


def on_main(action: Callable[[], T]) -> T:
    """What `action` gives on the main process, in all of them. An error there is raised in all: the others would wait
    for its word."""
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
