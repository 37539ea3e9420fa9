"""Intervals and paired tests against draws made one query at a time, and against counting all signs."""

import itertools

import numpy as np
import pytest

from adaclip_finetune.evaluation.bootstrap import intervals, paired_difference


def ranks(seed: int, count: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).geometric(0.2, count)


def test_intervals_are_those_of_queries_drawn_one_by_one() -> None:
    given, random = ranks(0), np.random.default_rng(1)
    drawn = given[random.integers(len(given), size=(10_000, len(given)))]
    expected = {f"R@{k}": 100 * (drawn <= k).mean(axis=1) for k in (1, 5, 10)}
    expected |= {"MedR": np.median(drawn, axis=1), "MeanR": drawn.mean(axis=1)}
    found = intervals(given)
    assert list(found) == ["R@1", "R@5", "R@10", "MedR", "MeanR"]
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=1.01 if "R@" in name else 0.51)
        assert found[name][0] < values.mean() < found[name][1] or name == "MedR"


def test_intervals_are_the_same_each_time_and_whatever_is_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ranks(2)
    first = intervals(given)
    monkeypatch.setattr("adaclip_finetune.evaluation.bootstrap._AT_ONCE", 1000)
    assert intervals(given) == first


def test_intervals_cover_what_is_true_about_95_times_in_100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaclip_finetune.evaluation.bootstrap.RESAMPLES", 400)
    covered = [low <= 20 <= high for low, high in (intervals(ranks(seed, 300))["R@1"] for seed in range(200))]
    assert 0.89 <= np.mean(covered) <= 0.99


def test_a_single_query_and_an_even_number_have_a_median() -> None:
    assert intervals(np.array([7]))["MedR"] == (7, 7)
    assert set(intervals(np.array([1, 4]))["MedR"]) == {1.0, 4.0}
    with pytest.raises(ValueError, match="no queries"):
        intervals(np.array([], np.int64))


def test_p_is_the_share_of_all_signs_that_go_as_far() -> None:
    one, other = ranks(3, 40), ranks(4, 40)
    difference = (one <= 1).astype(int) - (other <= 1)
    signs = np.array(list(itertools.product((1, -1), repeat=np.count_nonzero(difference))))
    as_far = np.abs(signs.sum(axis=1)) >= abs(difference.sum())
    found = paired_difference(one, other)
    assert found.p == pytest.approx(as_far.mean()) and 0 < found.p < 1
    assert found.points == pytest.approx(100 * difference.mean())
    assert (found.won, found.lost) == ((difference > 0).sum(), (difference < 0).sum())


def test_the_interval_of_a_difference_is_that_of_pairs() -> None:
    one, random = ranks(5), np.random.default_rng(6)
    other = np.where(random.random(200) < 0.1, 9, one)  # nearly the same model: unpaired intervals would be far wider
    difference = (one <= 1).astype(int) - (other <= 1)
    drawn = 100 * difference[random.integers(200, size=(10_000, 200))].mean(axis=1)
    found = paired_difference(one, other)
    assert found.interval == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.51)
    assert found.interval[1] - found.interval[0] < 6


def test_the_same_model_does_not_differ_from_itself() -> None:
    found = paired_difference(ranks(7), ranks(7))
    assert (found.points, found.interval, found.p) == (0, (0, 0), 1)
    with pytest.raises(ValueError, match="same queries"):
        paired_difference(ranks(7), ranks(7)[:-1])
    assert paired_difference(np.ones(30, np.int64), np.full(30, 6), k=5).p == pytest.approx(2 / 2**30)
