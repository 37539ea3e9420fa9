"""Intervals and paired tests against draws made one query or one video at a time, and against counting all signs."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

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


def videos_of(seed: int, count: int, queries: int) -> np.ndarray:
    """From 0, unsorted, each with at least one query."""
    random = np.random.default_rng(seed)
    return random.permutation(np.r_[np.arange(count), random.integers(count, size=queries - count)])


def test_queries_of_one_video_are_drawn_together() -> None:
    videos, random = videos_of(0, 80, 400), np.random.default_rng(1)
    easy = random.uniform(0.05, 0.9, 80)  # captions of a video are alike: the case that matters
    given = random.geometric(easy[videos])
    expected: dict[str, list[float]] = {name: [] for name in ("R@1", "R@5", "R@10", "MedR", "MeanR")}
    of_video = [given[videos == video] for video in range(80)]
    for _ in range(4000):
        drawn = np.concatenate([of_video[video] for video in random.integers(80, size=80)])
        for k in (1, 5, 10):
            expected[f"R@{k}"].append(100 * (drawn <= k).mean())
        expected["MedR"].append(float(np.median(drawn)))
        expected["MeanR"].append(drawn.mean())
    found, independent = intervals(given, 7 * videos - 3), intervals(given)
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.8 if "R@" in name else 0.5)
    assert found["R@1"][1] - found["R@1"][0] > 1.3 * (independent["R@1"][1] - independent["R@1"][0])


def test_a_caption_that_is_said_twenty_times_is_known_no_better() -> None:
    once, videos = ranks(8, 60), np.arange(60)
    found = intervals(np.repeat(once, 20), np.repeat(videos, 20))
    assert found["R@1"] == pytest.approx(intervals(once, videos)["R@1"], abs=1.7)
    other = ranks(9, 60)
    pair = paired_difference(np.repeat(once, 20), np.repeat(other, 20), np.repeat(videos, 20))
    alone = paired_difference(once, other)
    assert pair.p == pytest.approx(alone.p) and pair.points == pytest.approx(alone.points)
    assert pair.interval == pytest.approx(alone.interval, abs=1.7)
    assert (pair.won, pair.lost) == (20 * alone.won, 20 * alone.lost)


def test_none_and_all_get_an_exact_interval_of_so_many_videos() -> None:
    found = intervals(np.full(60, 7), np.repeat(np.arange(20), 3))
    # Of 20 videos, 0 are found with a probability of 2.5 % if the recall is 1 - 0.025 ** (1 / 20).
    assert found["R@1"] == found["R@5"] == pytest.approx((0, 100 * (1 - 0.025 ** (1 / 20))))
    assert found["R@10"] == pytest.approx((100 * 0.025 ** (1 / 20), 100))
    assert found["MedR"] == (7, 7)


def test_intervals_are_the_same_each_time_and_whatever_is_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given, videos = ranks(2), videos_of(2, 50, 200)
    first = intervals(given), intervals(given, videos)
    monkeypatch.setattr("adaclip_finetune.evaluation.bootstrap._AT_ONCE", 1000)
    assert (intervals(given), intervals(given, videos)) == first


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


@pytest.mark.parametrize("seed", range(6))
def test_signs_are_exchanged_by_video(seed: int) -> None:
    videos = videos_of(seed, 12, 90)
    one, other = ranks(seed, 90), ranks(seed + 50, 90) + seed % 2
    difference = (one <= 1).astype(int) - (other <= 1)
    of_video = np.bincount(videos, difference)
    sums = np.array([signs @ of_video for signs in np.array(list(itertools.product((1, -1), repeat=12)))])
    found = paired_difference(one, other, videos)
    assert found.p == pytest.approx((np.abs(sums) >= abs(difference.sum())).mean()) and 0 < found.p <= 1
    random = np.random.default_rng(seed)
    drawn = random.integers(12, size=(20_000, 12))
    points = 100 * of_video[drawn].sum(axis=1) / np.bincount(videos)[drawn].sum(axis=1)
    assert found.interval == pytest.approx(np.percentile(points, [2.5, 97.5]), abs=0.6)


def test_with_one_caption_a_video_it_is_mcnemars_test() -> None:
    one, other = ranks(10, 3000), ranks(11, 3000)
    found = paired_difference(one, other, np.arange(3000)[::-1])
    assert found.won + found.lost > 500
    assert found.p == pytest.approx(binomtest(found.won, found.won + found.lost).pvalue, rel=1e-9)
    assert found.p == pytest.approx(paired_difference(one, other).p, rel=1e-12)


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
    with pytest.raises(ValueError, match="200 queries have 200 videos, not 199"):
        paired_difference(ranks(7), ranks(7), np.arange(199))
    assert paired_difference(np.ones(30, np.int64), np.full(30, 6), k=5).p == pytest.approx(2 / 2**30)
