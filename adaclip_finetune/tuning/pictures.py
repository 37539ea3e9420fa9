"""A study in pictures, by Optuna's own matplotlib plots."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

_INCHES_A_PARAMETER = 3.5


def draw_study(study: optuna.Study, folder: Path, objective: str) -> None:
    """Write history.png, intermediate_values.png, and, from two completed trials with different values on,
    importances.png, slices.png and parallel_coordinates.png."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    drawings: dict[str, Callable[[], Any]] = {}
    if done:
        drawings["history"] = lambda: plots.plot_optimization_history(study, target_name=objective)
    if any(trial.intermediate_values for trial in study.get_trials(deepcopy=False)):
        drawings["intermediate_values"] = lambda: plots.plot_intermediate_values(study)
    if len({trial.value for trial in done}) > 1:
        drawings["importances"] = lambda: plots.plot_param_importances(study, target_name=objective)
        drawings["slices"] = lambda: plots.plot_slice(study, target_name=objective)
        drawings["parallel_coordinates"] = lambda: plots.plot_parallel_coordinate(study, target_name=objective)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        for name, draw in drawings.items():
            axes = np.ravel(draw())
            figure = axes[0].figure
            figure.set_size_inches(max(8.0, _INCHES_A_PARAMETER * len(axes)), 5.0)
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            pyplot.close(figure)
