"""A study in pictures: Optuna's own matplotlib plots, and on them what Optuna leaves out (which trials were pruned,
which is the best)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
from matplotlib.ticker import MaxNLocator
from optuna.distributions import IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.tuning.folder import best_trial

_INCHES_AN_AXIS = 2.6
_BEST, _COMPLETED, _PRUNED = "tab:red", "tab:blue", "0.55"


def draw_study(study: optuna.Study, folder: Path, objective: str) -> None:
    """Write history.png, intermediate_values.png, and, from two completed trials with different values on,
    importances.png, slices.png and parallel_coordinates.png. Raises UserError where they cannot be written."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    drawings: dict[str, Callable[[optuna.Study, str], Any]] = {}
    if done:
        drawings["history"] = _history
    if any(trial.intermediate_values for trial in study.get_trials(deepcopy=False)):
        drawings["intermediate_values"] = _intermediate_values
    if len({trial.value for trial in done}) > 1:
        drawings |= {"importances": _importances, "slices": _slices, "parallel_coordinates": _parallel_coordinates}
    # Optuna sets a style of its own for the whole process; the curves of a run are not to get it.
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", "Attempting to set identical")  # of a setting with one value
        for name, draw in drawings.items():
            figure = np.ravel(draw(study, objective))[0].figure
            figure.set_size_inches(max(8.0, _INCHES_AN_AXIS * len(figure.axes)), 5.0)
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=120, bbox_inches="tight")
            pyplot.close(figure)
            try:
                write_durably(folder / f"{name}.png", picture.getvalue(), shared=True)
            except OSError as error:
                raise UserError(f"{folder / name}.png could not be written: {error}") from error


def _history(study: optuna.Study, objective: str) -> Any:
    from optuna.visualization import matplotlib as plots

    axes: Any = plots.plot_optimization_history(study, target_name=objective)
    for line in axes.lines:
        line.set_drawstyle("steps-post")
    pruned = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
        if trial.value is not None  # the last that it reported
    ]
    if pruned:
        numbers, values = [trial.number for trial in pruned], [trial.value for trial in pruned]
        axes.scatter(numbers, values, color=_PRUNED, marker="x", label="pruned")
    axes.set(title=f"{study.study_name}: trials", xlabel="trial", ylabel=f"{objective} on validation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    completed, best, *rest = axes.get_legend_handles_labels()[0]
    axes.legend([completed, *rest, best], ["completed", *["pruned" for _ in rest], "best so far"])
    return axes


def _intermediate_values(study: optuna.Study, objective: str) -> Any:
    from optuna.visualization import matplotlib as plots

    axes: Any = plots.plot_intermediate_values(study)
    states = {trial.number: trial.state for trial in study.get_trials(deepcopy=False)}
    best = best_trial(study)
    kinds: dict[str, Any] = {}
    for line in axes.lines:
        number = int(line.get_label().removeprefix("Trial"))
        if best is not None and number == best.number:
            kind, colour = f"trial {number}, the best", _BEST
        elif states[number] == TrialState.COMPLETE:
            kind, colour = "completed", _COMPLETED
        else:
            kind, colour = "pruned, failed or running", _PRUNED
        line.set(color=colour, zorder=3 if colour == _BEST else 2)
        kinds[kind] = line
    axes.legend(kinds.values(), kinds.keys())
    axes.set(title=f"{study.study_name}: epochs", xlabel="epoch", ylabel=f"{objective} on validation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes


def _importances(study: optuna.Study, objective: str) -> Any:
    from optuna.visualization import matplotlib as plots

    axes: Any = plots.plot_param_importances(study, target_name=objective)
    done = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    axes.set_title("", loc="left")
    axes.set(
        title=f"{study.study_name}: what {objective} depends on",
        xlabel=f"share of the variance, estimated from {done} completed trials",
        ylabel=None,
    )
    axes.get_legend().remove()
    return axes


def _slices(study: optuna.Study, objective: str) -> Any:
    from optuna.visualization import matplotlib as plots

    axes: Any = plots.plot_slice(study, target_name=objective)
    kinds = {
        name: type(kind) for trial in study.get_trials(deepcopy=False) for name, kind in trial.distributions.items()
    }
    for part in np.ravel(axes):
        name = part.get_xlabel()
        if kinds.get(name) == IntDistribution and part.get_xscale() == "linear":
            part.xaxis.set_major_locator(MaxNLocator(integer=True))
        part.set_title("")  # where there is one only
    part.figure.suptitle(f"{study.study_name}: completed trials")
    return axes


def _parallel_coordinates(study: optuna.Study, objective: str) -> Any:
    from optuna.visualization import matplotlib as plots

    axes: Any = plots.plot_parallel_coordinate(study, target_name=objective)
    axes.set_title(f"{study.study_name}: completed trials")
    for scale in axes.figure.axes:  # one a parameter, each with lines of its own
        scale.grid(False)
    return axes
