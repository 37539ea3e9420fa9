"""One trial: draw values, train with them, and record in the study what came of it."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from sqlalchemy.exc import SQLAlchemyError

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.base import Figures, value
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.trainer import run_trial
from adaclip_finetune.tuning.report import StudyFolder, best_trial, rank
from adaclip_finetune.tuning.space import ImpossibleValues, Space, suggest, with_values
from adaclip_finetune.tuning.study import SURPLUS, heartbeat, place

# What only a single run needs: test data are not read, and nothing but the metrics and the best weights is left.
_NOT_IN_A_TRIAL: dict[str, Any] = {
    "test_annot": None,
    "save_last": False,
    "save_similarity": None,
    "tensorboard_dir": None,
}


class TrialFailed(Exception):
    """The trial failed for the reason in the message, or is one too many. The study goes on."""


class TunedTraining:
    """The objective function for study.optimize: one training, whose best validation metric is the value.

    A trial that fails, is pruned or is refused has the reason in its user attribute `reason`.
    """

    def __init__(self, config: Config, space: Space, folder: StudyFolder, n_trials: int, exclusive: bool) -> None:
        self.config = config.model_copy(update=_NOT_IN_A_TRIAL)
        self.space, self.folder, self.n_trials, self._exclusive = space, folder, n_trials, exclusive
        self.number: int | None = None  # of the trial that began last

    def __call__(self, trial: optuna.Trial) -> float:
        self.number = trial.number
        here = place(trial.study.get_trials(deepcopy=False), trial.number)
        if here >= self.n_trials:
            trial.set_user_attr(SURPLUS, True)
            raise TrialFailed("another process began the last trial at the same time")
        started = time.monotonic()
        alive: AbstractContextManager[None] = nullcontext() if self._exclusive else heartbeat(trial)
        with alive:
            values = suggest(trial, self.space)
            self.folder.say_begin(trial.number, here + 1, self.n_trials, values)
            try:
                return self._train(trial, values)
            finally:
                trial.set_user_attr("seconds", round(time.monotonic() - started, 1))

    def _train(self, trial: optuna.Trial, values: Mapping[str, Any]) -> float:
        try:
            config = with_values(self.config, values)
        except ImpossibleValues as error:
            trial.set_user_attr("reason", f"refused: {error}")
            raise optuna.TrialPruned from None

        def report(epoch: int, figures: Figures) -> None:
            current = self._value(figures)
            trial.report(current, epoch)
            if trial.should_prune():
                trial.set_user_attr("reason", f"pruned after epoch {epoch}, with {current:.1f}")
                raise optuna.TrialPruned

        with Path(os.devnull).open("w", encoding="utf-8") as silent:
            run = RunFolder(config, stream=silent, trial=self.folder.of_trial(trial.number))
            try:
                result = run_trial(config, run, report)
            except (optuna.TrialPruned, UpdateFinishedTrialError, StorageInternalError, SQLAlchemyError):
                raise
            except Exception as error:
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                trial.set_user_attr("reason", reason)
                if run.path is not None:
                    run.append_text("train.log", f"FAILED: {reason}\n{traceback.format_exc()}")
                raise TrialFailed(reason) from error
            finally:
                _record_cost(trial, run)
        trial.set_user_attr("best_epoch", result.best_epoch)
        found, best = self._value(result.best), best_trial(trial.study)
        if run.path is not None and (best is None or rank(trial.study, found) < rank(trial.study, best.value)):
            result.save(run.path / "best.safetensors")
        return found

    def _value(self, figures: Figures) -> float:
        return value(figures.as_dict(), self.config.searched_figure)


def _record_cost(trial: optuna.Trial, run: RunFolder) -> None:
    """Record the folder, how much learned, and the peak memory (on a CPU that of the process until now)."""
    if run.path is not None:
        trial.set_user_attr("folder", str(run.path))
    for event in run.events:
        if event["event"] == "parameters":
            parts = [part for part in event.values() if isinstance(part, dict)]
            trial.set_user_attr("trainable_parameters", sum(part.get("trainable", 0) for part in parts))
    if memory := [event["memory_mib"] for event in run.events if event["event"] == "train"]:
        trial.set_user_attr("peak_memory_mib", round(max(memory)))
