"""Which rows of the training data form each batch: functions of (seed, epoch, number of the batch).

A batch is a list of row numbers and is made when it is asked for, so that a run can resume at any batch of an epoch. In
a mixture the rows of all parts are numbered through, part after part. A row that comes up again in an epoch has another
number, larger by a multiple of the number of all rows, so that its random draws differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.config.parts import rows_in_batch
from adaclip_finetune.data.sampling import Shuffle, generator
from adaclip_finetune.errors import UserError
from adaclip_finetune.processes import rank, world_size

Order = Callable[[NDArray[np.int64]], NDArray[np.int64]]  # places in an order → the rows there
_COMPARED_AT_ONCE = 4096  # rows among which a row's neighbours are sought: 64 MB of similarities


@dataclass(frozen=True)
class Neighbours:
    """Which rows may stand side by side in a batch: groups of `size` whose captions are similar.

    `vectors` (n, D) are unit vectors of the rows' captions. Rows of one video, which have the same number in `videos`
    (n,), are no negatives of each other: a row takes none of its own video. Each epoch keeps a `share` of the groups,
    drawn at random, and shuffles the rows of the others.
    """

    size: int
    vectors: NDArray[np.float32]
    videos: NDArray[np.int64]
    share: float = 1

    def grouped(self, rows: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        """Return `rows`, which are in random order, in groups, which are in random order too.

        The row that resembles another one most comes first and takes its most similar rows, then the next that is free.
        The rows of groups that are not kept follow. Rows that are left over make smaller groups, at the end.
        """
        groups: list[list[int]] = []
        step = max(_COMPARED_AT_ONCE // self.size, 1) * self.size
        for start in range(0, len(rows), step):
            groups += self._groups(rows[start : start + step])
        whole, rest = ([g for g in groups if (len(g) == self.size) is is_whole] for is_whole in (True, False))
        ordered = [whole[place] for place in random.permutation(len(whole))]
        kept = round(self.share * len(whole))
        shuffled = random.permutation(_rows_of(ordered[kept:]))
        return np.concatenate([_rows_of(ordered[:kept]), shuffled, _rows_of(rest)])

    def _groups(self, rows: NDArray[np.int64]) -> list[list[int]]:
        vectors, videos = self.vectors[rows], self.videos[rows]
        similarity = vectors @ vectors.T
        similarity[videos[:, None] == videos] = -np.inf
        groups, free = [], np.ones(len(rows), dtype=bool)
        for place in np.argsort(-similarity.max(axis=1), kind="stable"):
            if not free[place]:
                continue
            group = [int(place)]
            free[place] = False
            for _ in range(self.size - 1):
                found = int(np.where(free, similarity[place], -np.inf).argmax())
                if not free[found] or similarity[place, found] == -np.inf:
                    break
                group.append(found)
                free[found] = False
            groups.append(rows[group].tolist())
        return groups


@dataclass(frozen=True)
class BatchPlan:
    """The batches of all epochs of a training set.

    `sizes` are the numbers of rows of its parts, and `shares` how much of each batch a part has, relative to the
    others. Without shares there is one part, and an epoch takes each of its rows once. `lazy` tells which parts are
    shuffled without a list of their rows. With `neighbours`, which a mixture cannot have, similar rows are in one
    batch.
    """

    sizes: tuple[int, ...]
    seed: int
    lazy: tuple[bool, ...] = (False,)
    shares: tuple[float, ...] = ()
    neighbours: Neighbours | None = field(default=None, compare=False)

    def num_batches(self, batch_size: int) -> int:
        """Return the number of batches of an epoch. Raise UserError for a part that is too small for its share.

        In a mixture it is that of the part with the most whole batches.
        """
        if not self.shares:
            return len(_starts(self.sizes[0], batch_size))
        counts = rows_in_batch(self.shares, batch_size)
        for number, (size, count) in enumerate(zip(self.sizes, counts, strict=True)):
            if not 0 < count <= size:
                wrong = f"has {size} rows, fewer than the {count} of" if count else "gets no row of"
                way_out = "give it less weight, or lower batch_size" if count else "raise its weight, or batch_size"
                raise UserError(f"train_annot[{number}] {wrong} a batch of {batch_size}: {way_out}")
        return max(size // count for size, count in zip(self.sizes, counts, strict=True))

    def updates(self, batch_size: int, gradient_accumulation_steps: int) -> int:
        """Return the optimizer steps of an epoch: ceil(batches / gradient_accumulation_steps)."""
        return math.ceil(self.num_batches(batch_size) / gradient_accumulation_steps)

    def epoch(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[list[int]]:
        """Yield the batches of an epoch, from batch number `start` on."""
        if not self.shares:
            yield from self._whole_epoch(epoch, batch_size, start)
            return
        counts = rows_in_batch(self.shares, batch_size)
        parts = [self._rows(part, epoch, count, start) for part, count in enumerate(counts)]
        for _ in range(start, self.num_batches(batch_size)):
            yield [row for part in parts for row in next(part)]

    def share(self, batch: list[int]) -> list[int]:
        """Return the rows of a batch that this process reads. Shares differ by at most one row.

        Of a mixture each process has a share of every part. The main process's share, whose batch statistics are kept,
        is never empty.
        """
        if self.shares:
            return batch[rank() :: world_size()]
        start, end = (-(-len(batch) * number // world_size()) for number in (rank(), rank() + 1))
        return batch[start:end]

    def _whole_epoch(self, epoch: int, batch_size: int, start: int) -> Iterator[list[int]]:
        order, starts = self._order(0, epoch, 0), _starts(self.sizes[0], batch_size)
        for number in range(start, len(starts)):
            end = starts[number + 1] if number + 1 < len(starts) else self.sizes[0]
            yield order(np.arange(starts[number], end)).tolist()

    def _rows(self, part: int, epoch: int, count: int, start: int) -> Iterator[list[int]]:
        """Yield `count` rows of a part for each batch: one shuffled cycle of the part after the other."""
        size, before, whole = self.sizes[part], sum(self.sizes[:part]), sum(self.sizes)
        cycle, place = divmod(start * count, size)
        order = self._order(part, epoch, cycle)
        while True:
            rows: list[int] = []
            while len(rows) < count:
                if place == size:
                    cycle, place = cycle + 1, 0
                    order = self._order(part, epoch, cycle)
                end = min(place + count - len(rows), size)
                rows += (order(np.arange(place, end)) + before + cycle * whole).tolist()
                place = end
            yield rows

    def _order(self, part: int, epoch: int, cycle: int) -> Order:
        random = generator("shuffle", self.seed, epoch, cycle * len(self.sizes) + part)
        if self.lazy[part]:
            return Shuffle(self.sizes[part], random)
        order = random.permutation(self.sizes[part])
        return (order if self.neighbours is None else self.neighbours.grouped(order, random)).__getitem__


def _rows_of(groups: list[list[int]]) -> NDArray[np.int64]:
    return np.array([row for group in groups for row in group], np.int64)


def _starts(num_rows: int, batch_size: int) -> range | list[int]:
    """Return where the batches of an epoch begin in the order of its rows: ceil(num_rows / batch_size) places.

    The last batch may be smaller, but never a single row, whose contrastive loss has nothing to compare with: such a
    row takes one from the batch before it, or joins that batch if it has only two.
    """
    starts = range(0, num_rows, batch_size)
    if len(starts) < 2 or batch_size == 1 or num_rows - starts[-1] > 1:
        return starts
    return [*starts[:-1], *([starts[-1] - 1] if batch_size > 2 else [])]
