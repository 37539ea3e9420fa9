"""Intervals and paired tests against draws of one query or video at a time, and against counting all signs."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from adaclip_finetune.evaluation import bootstrap
from adaclip_finetune.evaluation.bootstrap import difference_over_seeds, intervals, paired_difference, recall_over_seeds

FIGURES = ("R@1", "R@5", "R@10", "MedR", "MeanR")


def ranks(seed: int, count: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).geometric(0.2, count)


def videos_of(seed: int, count: int, queries: int) -> np.ndarray:
    """Return the video of each query, unsorted; each video has at least one."""
    random = np.random.default_rng(seed)
    return random.permutation(np.r_[np.arange(count), random.integers(count, size=queries - count)])


def figures_of(drawn: np.ndarray) -> list[float]:
    return [*(100 * (drawn <= k).mean() for k in (1, 5, 10)), float(np.median(drawn)), float(drawn.mean())]


def test_intervals_are_those_of_queries_drawn_one_by_one() -> None:
    given, random = ranks(0), np.random.default_rng(1)
    drawn = [figures_of(given[random.integers(len(given), size=len(given))]) for _ in range(4000)]
    found = intervals(given)
    assert tuple(found) == FIGURES
    for name, values in zip(FIGURES, np.array(drawn).T, strict=True):
        assert found[name] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=1.01 if "R@" in name else 0.51)


def test_queries_of_one_video_are_drawn_together() -> None:
    videos, random = videos_of(0, 80, 400), np.random.default_rng(1)
    easy = random.uniform(0.05, 0.9, 80)  # captions of a video are alike: the case that matters
    given = random.geometric(easy[videos])
    of_video = [given[videos == video] for video in range(80)]
    draws = random.integers(80, size=(4000, 80))
    drawn = [figures_of(np.concatenate([of_video[video] for video in draw])) for draw in draws]
    found, independent = intervals(given, 7 * videos - 3), intervals(given)
    for name, values in zip(FIGURES, np.array(drawn).T, strict=True):
        assert found[name] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.8 if "R@" in name else 0.5)
    assert found["R@1"][1] - found["R@1"][0] > 1.3 * (independent["R@1"][1] - independent["R@1"][0])


def test_few_kinds_of_videos_are_drawn_as_the_videos_one_by_one() -> None:
    """300 videos with two captions each have four kinds of ranks; above, there are about as many kinds as videos."""
    random = np.random.default_rng(0)
    given = np.array([[1, 1], [1, 20], [3, 20], [7, 40]])[random.integers(4, size=300)]
    drawn = [figures_of(given[random.integers(300, size=300)]) for _ in range(4000)]
    found = intervals(given.reshape(-1), np.repeat(np.arange(300), 2))
    for name, values in zip(FIGURES, np.array(drawn).T, strict=True):
        assert found[name] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.7 if "R@" in name else 0.35)


def test_a_recall_of_0_or_100_gets_the_exact_interval_of_so_many_videos() -> None:
    found = intervals(np.full(60, 7), np.repeat(np.arange(20), 3))
    # 0 of 20 videos are found with a probability of 2.5 % if the recall is 1 - 0.025 ** (1 / 20).
    assert found["R@1"] == found["R@5"] == pytest.approx((0, 100 * (1 - 0.025 ** (1 / 20))))
    assert found["R@10"] == pytest.approx((100 * 0.025 ** (1 / 20), 100)) and found["MedR"] == (7, 7)


def test_intervals_contain_the_truth_about_95_times_in_100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 400)
    covered = [low <= 20 <= high for low, high in (intervals(ranks(seed, 300))["R@1"] for seed in range(100))]
    assert 0.89 <= np.mean(covered) <= 0.99
    assert intervals(ranks(2)) == intervals(ranks(2))


@pytest.mark.parametrize("seed", range(4))
def test_p_is_the_share_of_all_exchanges_of_signs_by_video(seed: int) -> None:
    videos = videos_of(seed, 12, 90)
    one, other = ranks(seed, 90), ranks(seed + 50, 90) + seed % 2
    difference = (one <= 1).astype(int) - (other <= 1)
    of_video = np.bincount(videos, difference)
    sums = np.array(list(itertools.product((1, -1), repeat=12))) @ of_video
    found = paired_difference(one, other, videos)
    assert found.p == pytest.approx((np.abs(sums) >= abs(difference.sum())).mean()) and 0 < found.p <= 1
    assert found.points == pytest.approx(100 * difference.mean())
    assert (found.won, found.lost) == ((difference > 0).sum(), (difference < 0).sum())
    drawn = np.random.default_rng(seed).integers(12, size=(20_000, 12))
    points = 100 * of_video[drawn].sum(axis=1) / np.bincount(videos)[drawn].sum(axis=1)
    assert found.interval == pytest.approx(np.percentile(points, [2.5, 97.5]), abs=0.6)


def test_with_one_caption_a_video_it_is_mcnemars_test() -> None:
    one, other = ranks(10, 3000), ranks(11, 3000)
    found = paired_difference(one, other, np.arange(3000)[::-1])
    assert found.won + found.lost > 500
    assert found.p == pytest.approx(binomtest(found.won, found.won + found.lost).pvalue, rel=1e-9)
    assert found.p == pytest.approx(paired_difference(one, other).p, rel=1e-12)


def test_a_model_does_not_differ_from_itself() -> None:
    found = paired_difference(ranks(7), ranks(7))
    assert (found.points, found.interval, found.p) == (0, (0, 0), 1)
    assert paired_difference(np.ones(30, np.int64), np.full(30, 6), k=5).p == pytest.approx(2 / 2**30)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((ranks(7), ranks(7)[:-1]), "same queries"),
        ((ranks(7), ranks(7), np.arange(199)), "200 queries have 200 videos, not 199"),
        ((ranks(7, 0), ranks(7, 0)), "no queries"),
    ],
)
def test_wrong_ranks_are_refused(given: tuple[np.ndarray, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(*given)


def over_seeds(hits: np.ndarray, videos: np.ndarray, draws: int = 3000) -> np.ndarray:
    """Return the percentiles of draws of runs and videos, one at a time."""
    random, (runs, _) = np.random.default_rng(5), hits.shape
    of_video = [hits[:, videos == video] for video in np.unique(videos)]
    found = []
    for _ in range(draws):
        captions = np.concatenate([of_video[video] for video in random.integers(len(of_video), size=len(of_video))], 1)
        found.append(100 * np.mean([captions[run].mean() for run in random.integers(runs, size=runs)]))
    return np.percentile(found, [2.5, 97.5])


def test_intervals_over_seeds_are_those_of_runs_and_videos_drawn_one_by_one() -> None:
    """Videos differ in difficulty and in their number of captions, and runs differ in quality."""
    videos, random = videos_of(0, 60, 180), np.random.default_rng(1)
    easy = random.uniform(0.1, 0.8, 60)[videos]
    one = random.geometric(np.clip(easy + random.normal(0, 0.15, (5, 1)), 0.02, 0.98))
    other = random.geometric(easy * 0.7, (5, 180))
    mean, interval = recall_over_seeds(one, 3 * videos + 2)
    assert mean == pytest.approx(100 * (one <= 1).mean())
    assert interval == pytest.approx(over_seeds(one <= 1, videos), abs=0.9)
    assert interval[1] - interval[0] > 1.2 * np.ptp(recall_over_seeds(one.reshape(1, -1), np.tile(videos, 5))[1])
    for baseline in (other, other[:1]):
        difference = (one <= 1).astype(int) - (baseline <= 1)
        points, interval = difference_over_seeds(one, baseline, videos)
        assert points == pytest.approx(100 * difference.mean())
        assert interval == pytest.approx(over_seeds(difference, videos), abs=0.9)


def test_with_one_run_the_intervals_over_seeds_are_those_over_videos() -> None:
    videos, one, other = videos_of(0, 80, 300), ranks(0, 300), ranks(1, 300)
    assert recall_over_seeds(one[None], videos)[1] == pytest.approx(intervals(one, videos)["R@1"], abs=0.4)
    paired = paired_difference(one, other, videos)
    points, interval = difference_over_seeds(one[None], other[None], videos)
    assert points == pytest.approx(paired.points) and interval == pytest.approx(paired.interval, abs=0.4)
    assert recall_over_seeds(np.full((3, 300), 9), videos) == (0, intervals(np.full(300, 9), videos)["R@1"])
