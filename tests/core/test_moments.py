"""How videos are divided into windows and shots, and how scores of windows become moments."""

import numpy as np
import pytest

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.moments import MomentSettings, _colours, _shots
from adaclip_finetune.search.peaks import find_peaks


@pytest.mark.parametrize(
    ("window", "stride", "length", "wanted"),
    [
        (4, 2, 3.0, [(0, 3)]),  # shorter than a window
        (4, 2, 4.0, [(0, 4)]),
        (4, 2, 8.0, [(0, 4), (2, 6), (4, 8)]),
        (4, 2, 8.5, [(0, 4), (2, 6), (4, 8), (4.5, 8.5)]),  # the last one ends with the video
        (2, 2, 4.0005, [(0, 2), (2, 4)]),  # and not for half a millisecond
        (0.3, 0.1, 0.5, [(0, 0.3), (0.1, 0.4), (0.2, 0.5)]),
    ],
)
def test_windows(window: float, stride: float, length: float, wanted: list[tuple[float, float]]) -> None:
    assert MomentSettings("windows", window, stride).windows(length) == wanted


@pytest.mark.parametrize(
    ("window", "stride", "fact"), [(0.01, 0.01, "--window"), (4, 5, "--stride"), (4, 0, "--stride")]
)
def test_windows_that_are_refused(window: float, stride: float, fact: str) -> None:
    with pytest.raises(UserError, match=fact):
        MomentSettings("windows", window, stride)


def test_shots() -> None:
    def still(*colour: int) -> np.ndarray:
        return _colours(np.full((70, 130, 3), colour, np.uint8))

    red, blue, dark = still(250, 10, 10), still(10, 10, 250), still(200, 10, 10)
    assert _shots(np.stack([red] * 3 + [blue] * 4), 10) == [(0, 3), (3, 7)]
    assert _shots(np.stack([red, blue, red, red]), 10) == [(0, 2), (2, 4)]  # no shot has a single frame
    assert _shots(np.stack([red, red, blue]), 10) == [(0, 3)]
    assert _shots(np.stack([red, dark] * 2), 10) == [(0, 4)]  # a little darker is the same of 64 colours
    assert _shots(np.stack([red] * 9), 4) == [(0, 3), (3, 6), (6, 9)]  # a long one is divided evenly
    assert _shots(red[None], 4) == [(0, 1)]
    frame = np.zeros((64, 64, 3), np.uint8)
    frame[:16] = 255
    assert _colours(frame)[[0, 63]].tolist() == [0.75, 0.25]


def peaks(window: float, stride: float, scores: list[float]) -> list[tuple[float, ...]]:
    """Return the moments of windows whose best frames are in their middles."""
    starts = np.arange(len(scores)) * stride
    spans = np.stack([starts, starts + window], axis=1)
    return [tuple(peak) for peak in find_peaks(spans, spans.mean(axis=1), np.array(scores))]


def test_a_moment_is_where_windows_agree() -> None:
    """Of windows of 2 s that start every second, the event from 4 to 6 s fills one, and half of its neighbours."""
    assert peaks(2, 1, [0, 0, 0, 0.5, 1, 0.5, 0, 0]) == [(4, 6, 1, 4, 4)]


def test_a_window_whose_neighbours_disagree_is_a_moment() -> None:
    assert peaks(2, 1, [0, 0, 1, 0, 0]) == [(2, 4, 1, 2, 2)]


def test_neighbours_that_score_alike_are_one_moment() -> None:
    assert peaks(1, 1, [0, 0.9, 1, 0.8, 0, 0]) == [(1, 4, 1, 2, 2)]
    assert peaks(2, 2, [0.5, 0.5, 0.5]) == [(0, 6, 0.5, 0, 0)]
    assert peaks(8, 8, [0.2]) == [(0, 8, 0.2, 0, 0)]


def test_several_moments_come_best_first_and_do_not_overlap() -> None:
    found = peaks(2, 1, [0.8, 0.4, 0, 0, 0.5, 1, 0.5, 0, 0])
    assert [peak[:3] for peak in found] == [(5, 7, 1), (0, 1, 0.8)]
    assert [peak[3] for peak in peaks(1, 1, [0, 0.7, 0, 1, 0])] == [3, 1]  # what is below the mean is no moment


def test_the_frame_that_is_shown_lies_in_the_moment() -> None:
    spans = np.array([(0.0, 2.0), (1.0, 3.0), (2.0, 4.0)])
    (peak,) = find_peaks(spans, np.array([0.5, 2.9, 2.5]), np.array([0.0, 1.0, 0.9]))
    assert peak == (2, 4, 1.0, 1, 1)
    (peak,) = find_peaks(spans, np.array([0.5, 1.5, 2.5]), np.array([0.0, 1.0, 0.9]))
    assert peak == (2, 4, 1.0, 1, 2)
