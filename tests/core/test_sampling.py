"""Frame indices: those of the published system, those of variable frame rates, and the properties of random draws."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from golden import load_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from adaclip_finetune.data.sampling import Shuffle, frame_indices, generator

# 2 s at 25 frames a second, then 6 s at 1 frame a second
SLOWING = np.concatenate([np.arange(50) / 25, 2.0 + np.arange(6)])


def test_published_indices() -> None:
    cases = load_golden("op_frame_index")
    assert len(cases) == 487
    held = 0
    for case in cases:
        n, num_frm, subset = case["num_frames"], case["num_frm"], case["subset"]
        randomly = case["sampling"] == "random"
        draw = generator("frames", 0, 0, 0) if randomly and case["is_train"] else None
        ours = frame_indices(n, num_frm, segment=case["segment"], subset=subset, random=draw).tolist()
        if "error" in case:  # more frames wanted than there are: ours repeats
            assert len(ours) == subset
            continue
        if randomly and 0 < subset < num_frm:  # the published system draws the subset in evaluation too; ours does not
            assert len(ours) == len(case["indices0"]) and ours == sorted(ours)
            assert set(ours) <= set(frame_indices(n, num_frm, segment=case["segment"])) or draw is not None
        elif draw is not None and not case["segment"]:
            assert len(set(ours)) == len(case["indices0"]) and ours == sorted(ours) and 0 <= ours[0] <= ours[-1] < n
        else:
            assert ours == case["indices0"], case
            held += 1
    assert held == 475  # the other 12 are draws


def test_frames_of_clip_vip_in_evaluation() -> None:
    for n, num_frm, expected in load_golden("op_clip_vip_frames")["test"]:
        assert frame_indices(n, num_frm, to_last=True).tolist() == expected, (n, num_frm)


def test_the_ends_of_clip_vip_in_training() -> None:
    for case, expected in load_golden("op_clip_vip_frames")["ends"].items():
        n, num_frm = map(int, case.split("/"))
        draws = [frame_indices(n, num_frm, random=generator("frames", 0, 0, i), draw="ends") for i in range(1000)]
        for name, place in (("starts", 0), ("ends", -1)):
            found = {int(draw[place]) for draw in draws}
            assert [min(found), max(found)] == expected[name] and len(found) == expected[f"n_{name}"]
    assert frame_indices(7, 1, random=generator("frames", 0, 0, 0), draw="ends").shape == (1,)


def test_a_frame_is_drawn_in_each_segment() -> None:
    draws = [frame_indices(30, 3, random=generator("frames", 0, 0, i), draw="segments") for i in range(1000)]
    for number in range(3):
        assert {int(draw[number]) for draw in draws} == set(range(10 * number, 10 * number + 10))


TIMES = [None, np.array([0.0, 0.1, 5.0]), SLOWING, np.cumsum(np.random.default_rng(0).exponential(size=300))]


@settings(deadline=None)
@given(
    n=st.integers(1, 500), num_frm=st.integers(1, 70), subset=st.integers(0, 80), segment=st.booleans(),
    to_last=st.booleans(), draw=st.sampled_from(["random", "segments", "ends"]),
    seed=st.integers(0, 2**40), randomly=st.booleans(), times=st.sampled_from(range(len(TIMES))),
)  # fmt: skip
def test_always_sorted_in_range_and_counted(
    n: int, num_frm: int, subset: int, segment: bool, to_last: bool, draw: str, seed: int, randomly: bool, times: int
) -> None:
    random = generator("frames", seed, 1, 2) if randomly else None
    shown = TIMES[times]
    n = n if shown is None else len(shown)
    indices = frame_indices(
        n, num_frm, segment=segment, to_last=to_last, subset=subset, random=random, draw=draw, times=shown
    )
    assert indices.dtype == np.int64
    assert len(indices) == (min(subset, num_frm) if subset else num_frm)
    assert (np.diff(indices) >= 0).all() and indices[0] >= 0 and indices[-1] < n
    if to_last or (randomly and draw != "random"):
        return
    if n >= num_frm and (shown is None or (randomly and not segment)):
        assert len(set(indices.tolist())) == len(indices)
    elif shown is None and not segment and not subset:  # a short video repeats its frames equally often
        times_read = np.bincount(indices, minlength=n)
        assert times_read.max() - times_read.min() <= 1


RATES = ("25", "24000/1001", "30000/1001", "50", "60000/1001", "1", "7")


@pytest.mark.parametrize(("rate", "tick"), [*itertools.product(RATES, ("1/1000", "1/90000", "1/12800")), ("7", "1/25")])
def test_at_a_constant_rate_times_change_nothing(rate: str, tick: str) -> None:
    """Containers round times to ticks of their own, which are shorter than half a frame."""
    for n in (1, 2, 9, 250, 1801):
        ticks = [round(Fraction(i) / Fraction(rate) / Fraction(tick)) for i in range(n)]
        times = np.array(ticks) * float(Fraction(tick)) + 1.4
        for num_frm in (1, 2, 8, 12, 16, 64):
            for segment in (False, True):
                timed, counted = (frame_indices(n, num_frm, segment=segment, times=each) for each in (times, None))
                assert np.array_equal(timed, counted)


def test_uniform_frames_are_evenly_spread_in_time() -> None:
    """By number, all 8 of 8 would come from the first 2 of 8 seconds."""
    assert frame_indices(56, 8).max() == 49
    shown = SLOWING[frame_indices(56, 8, times=SLOWING)]
    even = np.arange(8) * SLOWING[-1] * 56 / 55 / 8
    assert ((shown <= even + 1e-9) & (even - shown < 1)).all() and (shown >= 2).sum() == 5
    assert frame_indices(2, 4, times=np.array([0.0, 9.0])).tolist() == [0, 0, 1, 1]
    assert frame_indices(3, 6, times=np.array([0.0, 8.0, 9.0])).tolist() == [0, 0, 0, 0, 2, 2]  # a still picture


def test_random_frames_are_drawn_by_how_long_they_are_shown() -> None:
    def draw(index: int) -> int:
        return int(frame_indices(56, 1, times=SLOWING, random=generator("frames", 0, 0, index))[0])

    draws = [draw(index) for index in range(400)]
    late = sum(index >= 50 for index in draws) / 400  # frame 50 is the first that is shown for a whole second
    assert late == pytest.approx(5.13 / 7.13, abs=0.06)
    assert max(Counter(draws).values()) < 100 and draws[7] == draw(7)


def test_draws_depend_on_stream_seed_epoch_and_index_alone() -> None:
    """A changed generator would make finished runs unrepeatable: numpy keeps Philox streams stable."""
    others = [("caption", 7, 3, 11), ("frames", 8, 3, 11), ("frames", 7, 4, 11), ("frames", 7, 3, 1)]
    drawn = {tuple(frame_indices(100, 5, random=generator(*draw)).tolist()) for draw in others}
    assert frame_indices(100, 5, random=generator("frames", 7, 3, 11)).tolist() == [80, 84, 87, 89, 92]
    assert len(drawn) == 4 and (80, 84, 87, 89, 92) not in drawn


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 3000), seed=st.integers(0, 9))
def test_a_shuffle_gives_each_number_once_and_in_any_pieces(size: int, seed: int) -> None:
    shuffle = Shuffle(size, generator("shuffle", seed, 0))
    order = shuffle(np.arange(size))
    assert sorted(order) == list(range(size))
    pieces = [shuffle(np.arange(start, min(start + 7, size))) for start in range(0, size, 7)]
    assert np.array_equal(np.concatenate(pieces), order)


def test_a_shuffle_is_near_to_a_random_permutation() -> None:
    orders = [Shuffle(1000, generator("shuffle", seed, 0))(np.arange(1000)) for seed in range(200)]
    firsts = Counter(int(order[0]) // 100 for order in orders)
    assert len(firsts) == 10 and max(firsts.values()) < 50
    follows = np.mean([np.abs(np.diff(order)).mean() for order in orders])
    assert abs(follows - 1001 / 3) < 3  # the expected distance of neighbours in a random permutation of 1000
    assert abs(np.mean([np.corrcoef(order, np.arange(1000))[0, 1] for order in orders])) < 0.01
