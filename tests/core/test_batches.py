"""Which rows form the batches: of one annotation, and of mixtures."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaclip_finetune.config.parts import rows_in_batch
from adaclip_finetune.data import batches as of_processes
from adaclip_finetune.data.batches import BatchPlan, Neighbours
from adaclip_finetune.errors import UserError


@settings(deadline=None, max_examples=50)
@given(num_entries=st.integers(1, 200), batch_size=st.integers(1, 60), epoch=st.integers(0, 3))
def test_an_epoch_takes_every_row_once(num_entries: int, batch_size: int, epoch: int) -> None:
    plan = BatchPlan((num_entries,), seed=3)
    batches = list(plan.epoch(epoch, batch_size))
    assert sorted(index for batch in batches for index in batch) == list(range(num_entries))
    sizes = [len(batch) for batch in batches]
    if num_entries > 1 and batch_size > 1:
        assert min(sizes) >= 2
    assert max(sizes) <= (batch_size if batch_size != 2 else 3)
    if batch_size != 2:
        assert len(batches) == plan.updates(batch_size, 1) == -(-num_entries // batch_size)
    if num_entries > 50:
        assert len({tuple(next(BatchPlan((num_entries,), seed).epoch(epoch, 500))) for seed in range(3)}) == 3


@pytest.mark.parametrize(("shares", "batch_size", "rows"), [
    ((3, 1), 8, [6, 2]),
    ((24.0, 8.0), 32, [24, 8]),
    ((1, 1, 1), 8, [3, 3, 2]),
    ((0.7, 0.2, 0.1), 16, [11, 3, 2]),
    ((0.1, 0.2), 3, [1, 2]),
    ((100, 1), 8, [8, 0]),
])  # fmt: skip
def test_rows_of_a_batch_are_shared_by_the_largest_remainder(
    shares: tuple[float, ...], batch_size: int, rows: list[int]
) -> None:
    assert rows_in_batch(shares, batch_size) == rows


@st.composite
def mixtures(draw: Any) -> tuple[BatchPlan, list[int], int]:
    """Return a plan, the rows of each part in a batch, and the batch size."""
    counts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    sizes = tuple(draw(st.integers(count, 40)) for count in counts)
    lazy = tuple(draw(st.booleans()) for _ in counts)
    return BatchPlan(sizes, draw(st.integers(0, 9)), lazy, tuple(map(float, counts))), counts, sum(counts)


@settings(deadline=None, max_examples=60)
@given(mixtures(), st.integers(0, 3))
def test_every_batch_of_a_mixture_has_the_same_composition(
    mixture: tuple[BatchPlan, list[int], int], epoch: int
) -> None:
    plan, counts, batch_size = mixture
    found = list(plan.epoch(epoch, batch_size))
    assert len(found) == plan.num_batches(batch_size) == max(n // c for n, c in zip(plan.sizes, counts, strict=True))
    numbers = [row for batch in found for row in batch]
    assert len(set(numbers)) == len(numbers), "two draws of a row have the same number"
    before, place = 0, 0
    for size, count in zip(plan.sizes, counts, strict=True):
        rows = [row % sum(plan.sizes) - before for batch in found for row in batch[place : place + count]]
        for start in range(0, len(rows), size):  # a part that runs out starts again, with all of its rows
            cycle = rows[start : start + size]
            assert len(set(cycle)) == len(cycle) and 0 <= min(cycle) <= max(cycle) < size
        before, place = before + size, place + count
    for start in (1, len(found) - 1):
        assert list(plan.epoch(epoch, batch_size, start)) == found[start:]


def test_parts_epochs_and_cycles_have_orders_of_their_own() -> None:
    for lazy in (True, False):
        plan = BatchPlan((30, 30), 0, (lazy, lazy), (10.0, 20.0))
        orders = [[], [], [], []]  # the first part, both cycles of the second, the first part of the next epoch
        for batch in plan.epoch(0, 30):
            orders[0] += batch[:10]
            second = [row - 30 for row in batch[10:]]
            orders[1] += [row for row in second if row < 30]
            orders[2] += [row - 60 for row in second if row >= 60]
        for batch in plan.epoch(1, 30):
            orders[3] += batch[:10]
        assert all(sorted(order) == list(range(30)) for order in orders)
        assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_each_process_has_its_share_of_every_part(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = BatchPlan((9, 4), 0, (False, False), (3.0, 2.0))
    batch = next(plan.epoch(0, 5))
    shares = []
    for number in range(processes):
        monkeypatch.setattr(of_processes, "rank", lambda number=number: number)
        monkeypatch.setattr(of_processes, "world_size", lambda: processes)
        shares.append(plan.share(batch))
    assert sorted(row for share in shares for row in share) == sorted(batch) and shares[0]
    for part in (range(9), range(9, 13)):
        held = [sum(row in part for row in share) for share in shares]
        assert max(held) - min(held) <= 1


@pytest.mark.parametrize(("sizes", "told"), [
    ((30, 3), r"train_annot\[1\] has 3 rows, fewer than the 4"),
    ((9, 100), r"train_annot\[0\] has 9 rows"),
])  # fmt: skip
def test_a_part_smaller_than_its_share_is_refused(sizes: tuple[int, ...], told: str) -> None:
    with pytest.raises(UserError, match=told):
        BatchPlan(sizes, 0, (False, False), (3.0, 1.0)).num_batches(16)
    with pytest.raises(UserError, match=r"train_annot\[1\] gets no row of a batch of 2"):
        BatchPlan((30, 30), 0, (False, False), (9.0, 1.0)).num_batches(2)


def twenty_pairs(share: float) -> BatchPlan:
    """Return the plan of 40 rows, of which 2i and 2i + 1 are nearest neighbours."""
    angles = np.repeat(np.arange(20) / 20, 2) + np.tile([0, 0.001], 20)
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    return BatchPlan((40,), 0, neighbours=Neighbours(2, vectors, np.arange(40), share))


def test_similar_rows_are_in_one_batch_in_other_batches_each_epoch() -> None:
    plan = twenty_pairs(1)
    first, second = (list(plan.epoch(epoch, 8)) for epoch in (0, 1))
    for batches in (first, second):
        assert sorted(row for batch in batches for row in batch) == list(range(40))
        assert all({row ^ 1 for row in batch} == set(batch) for batch in batches)
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    assert list(plan.epoch(1, 8, start=3)) == second[3:]


def test_each_epoch_keeps_a_share_of_the_groups_and_shuffles_the_other_rows() -> None:
    plan, together = twenty_pairs(0.4), []
    for epoch in range(2):
        batches = list(plan.epoch(epoch, 8))
        assert sorted(row for batch in batches for row in batch) == list(range(40))
        assert all({row ^ 1 for row in batch} == set(batch) for batch in batches[:2])  # 16 of 40 rows
        pairs = [{row // 2 for row in batch} for batch in batches[2:]]
        assert sum(map(len, pairs)) > 16, "some of the other 12 pairs are in two batches"
        together.append({row for batch in batches[:2] for row in batch})
    assert together[0] != together[1]


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 40),
    size=st.integers(1, 7),
    videos=st.integers(1, 40),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 9),
)
def test_groups_have_each_row_once_and_pairs_never_the_same_video(
    rows: int, size: int, videos: int, share: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    vectors, of_video = random.normal(size=(rows, 3)).astype(np.float32), random.integers(videos, size=rows)
    order = random.permutation(rows)
    assert sorted(Neighbours(size, vectors, of_video, share).grouped(order, random).tolist()) == list(range(rows))
    pairs = [group for group in Neighbours(2, vectors, of_video)._groups(order) if len(group) == 2]
    assert all(of_video[first] != of_video[second] for first, second in pairs)
    # Those that are left alone could not be paired: they are of one video.
    alone = {group[0] for group in Neighbours(2, vectors, of_video)._groups(order) if len(group) == 1}
    assert len({int(of_video[row]) for row in alone}) <= 1
