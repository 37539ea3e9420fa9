"""A study in pictures, and what is said on them."""

import warnings
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from PIL import Image

from adaclip_finetune.errors import UserError
from adaclip_finetune.tuning import pictures
from adaclip_finetune.tuning.pictures import draw_study

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "learning_rate": FloatDistribution(1e-5, 1e-2, log=True),
    "top_k": IntDistribution(1, 8),
    "frame_agg": CategoricalDistribution(["mlp", None]),
    "use_rnn": CategoricalDistribution([True]),
}
ALL = {"history", "intermediate_values", "importances", "slices", "parallel_coordinates"}


def study_of(*trials: tuple[TrialState, dict[str, Any], list[float]], direction: str = "maximize") -> optuna.Study:
    """State, parameters, and the value of each epoch; the last one counts."""
    study = optuna.create_study(study_name="shapes-bitfit", direction=direction)
    for state, values, epochs in trials:
        study.add_trial(
            optuna.create_trial(
                state=state,
                params=values,
                distributions={name: DISTRIBUTIONS[name] for name in values},
                value=epochs[-1] if state in (COMPLETE, PRUNED) and epochs else None,
                intermediate_values=dict(enumerate(epochs, 1)),
            )
        )
    return study


def point(learning_rate: float, top_k: int = 4, frame_agg: str | None = "mlp") -> dict[str, Any]:
    return {"learning_rate": learning_rate, "top_k": top_k, "frame_agg": frame_agg, "use_rnn": True}


pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture(scope="module")
def study() -> optuna.Study:
    return study_of(
        (COMPLETE, point(1e-4), [10.0, 20.0]),
        (PRUNED, point(1e-5), [3.0]),
        (COMPLETE, point(1e-3, 6, None), [30.0, 40.0]),
        (FAIL, point(9e-3), []),
        (PRUNED, {}, []),  # refused before its first epoch
        (COMPLETE, point(2e-3, 8), [35.0, 38.0]),
    )


def test_all_pictures_and_nothing_else_of_optuna_s(study: optuna.Study, tmp_path: Path) -> None:
    matplotlib.use("Agg")
    style = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_study(study, tmp_path, "t2v.R@1")
    assert dict(matplotlib.rcParams) == style
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in ALL}
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width > 800 and len(picture.getcolors(1 << 24) or []) > 20
        assert path.stat().st_size < 300_000


@pytest.mark.parametrize(
    ("trials", "drawn"),
    [
        ([], set()),
        ([(FAIL, point(1e-3), [])], set()),
        ([(PRUNED, point(1e-3), [1.0])], {"intermediate_values"}),
        ([(COMPLETE, point(1e-3), [1.0])], {"history", "intermediate_values"}),
        ([(COMPLETE, point(1e-3), [1.0]), (COMPLETE, point(1e-4), [1.0])], {"history", "intermediate_values"}),
    ],
    ids=["nothing", "failed", "pruned", "one", "two alike"],
)
def test_what_there_is_is_drawn(trials: list[Any], drawn: set[str], tmp_path: Path) -> None:
    draw_study(study_of(*trials, direction="minimize"), tmp_path, "t2v.MedR")
    assert {path.stem for path in tmp_path.iterdir()} == drawn


def test_history_marks_the_pruned(study: optuna.Study) -> None:
    with matplotlib.rc_context():
        axes = pictures._history(study, "t2v.R@1")
    completed, pruned = (
        {tuple(map(float, place)) for place in dots.get_offsets()}
        for dots in axes.collections
        if len(dots.get_offsets())
    )
    assert completed == {(0, 20), (2, 40), (5, 38)} and pruned == {(1, 3)}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["completed", "pruned", "best so far"]
    (best,) = axes.lines
    assert best.get_ydata()[-1] == 40 and best.get_drawstyle() == "steps-post"
    assert axes.get_ylabel() == "t2v.R@1 on validation" and "shapes-bitfit" in axes.get_title()


def test_epochs_tell_the_best_from_the_others(study: optuna.Study) -> None:
    with matplotlib.rc_context():
        axes = pictures._intermediate_values(study, "t2v.R@1")
    colours = {line.get_label(): line.get_color() for line in axes.lines if len(line.get_xdata())}
    assert colours["Trial2"] == pictures._BEST and colours["Trial1"] == pictures._PRUNED
    assert {colours["Trial0"], colours["Trial5"]} == {pictures._COMPLETED}
    legend = {text.get_text() for text in axes.get_legend().get_texts()}
    assert {"trial 2, the best", "completed"} <= legend
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_a_folder_that_is_gone(study: optuna.Study, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"history\.png could not be written"):
        draw_study(study, tmp_path / "gone", "t2v.R@1")
