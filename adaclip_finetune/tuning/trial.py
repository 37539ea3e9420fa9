"""One trial: values from the sampler, a run with them, and what the study keeps of it.

A trial that ends for a reason of its own (refused, pruned, failed) says it in the user attribute `reason`. One without
was interrupted, and its point is tried again.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from sqlalchemy.exc import SQLAlchemyError

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.base import Figures, value
from adaclip_finetune.training.memory import is_out_of_memory
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.trainer import TrialResult, run_trial
from adaclip_finetune.tuning.folder import StudyFolder, best_trial, order
from adaclip_finetune.tuning.ledger import is_surplus
from adaclip_finetune.tuning.space import Impossible, Space, suggest, with_values

BEST = "best.safetensors"


class Surplus(Exception):
    """More workers asked for a trial at once than were wanted."""


class TrialFailed(Exception):
    """The trial ended badly, for the reason that the message gives; the study goes on."""


class Objective:
    """One trial, to the value that it has. For study.optimize, which is to catch Surplus and TrialFailed."""

    def __init__(
        self,
        config: Config,
        space: Space,
        folder: StudyFolder,
        wanted: int,
        alive: Callable[[optuna.Trial], AbstractContextManager[None]],
    ) -> None:
        assert config.optuna_cfg is not None
        self.config, self.space, self.folder, self.wanted, self.alive = config, space, folder, wanted, alive
        self.metric = config.searched_figure
        self.taken_away: int | None = None  # the trial that another process ended

    def __call__(self, trial: optuna.Trial) -> float:
        try:
            with self.alive(trial):
                return self._begin(trial)
        except KeyboardInterrupt:
            trial.set_user_attr("interrupted", True)
            raise
        except UpdateFinishedTrialError:  # this process slept, and another one took it for dead
            self.taken_away = trial.number
            raise

    def _begin(self, trial: optuna.Trial) -> float:
        if is_surplus(trial.study.get_trials(deepcopy=False), trial.number, self.wanted):
            trial.set_user_attr("surplus", True)
            raise Surplus
        started = time.monotonic()
        values = suggest(trial, self.space)
        self.folder.say_begin(trial.study, trial.number, values, self.wanted)
        try:
            return self._run(trial, values)
        finally:
            trial.set_user_attr("seconds", round(time.monotonic() - started, 1))

    def _run(self, trial: optuna.Trial, values: Mapping[str, Any]) -> float:
        try:
            config = with_values(self._for_a_trial(), values)
        except Impossible as refusal:
            trial.set_user_attr("reason", f"refused: {refusal}")
            raise optuna.TrialPruned(str(refusal)) from None
        with Path(os.devnull).open("w", encoding="utf-8") as silent:
            run = RunFolder(config, stream=silent, trial=self.folder.of_trial(trial.number))
            try:
                result = run_trial(config, run, lambda epoch, found: self._report(trial, epoch, found))
            except (optuna.TrialPruned, UpdateFinishedTrialError, StorageInternalError, SQLAlchemyError):
                raise  # no failure of the trial's own
            except Exception as error:
                raise TrialFailed(self._failed(trial, run, error)) from error
            finally:
                _note_cost(trial, run)
        return self._keep(trial, result, run)

    def _for_a_trial(self) -> Config:
        """Nothing of the test, and nothing that only a single run leaves."""
        return self.config.model_copy(
            update={"test_annot": None, "save_last": False, "save_similarity": None, "tensorboard_dir": None}
        )

    def _report(self, trial: optuna.Trial, epoch: int, found: Figures) -> None:
        value = self._value(found)
        trial.report(value, epoch)
        if trial.should_prune():
            trial.set_user_attr("reason", f"pruned after epoch {epoch}, with {value:.1f}")
            raise optuna.TrialPruned

    def _failed(self, trial: optuna.Trial, run: RunFolder, error: Exception) -> str:
        """Why, in words; the whole story goes to the trial's log."""
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if is_out_of_memory(error) and "out of memory" not in reason:
            reason = f"out of memory: {reason}"
        trial.set_user_attr("reason", reason)
        if run.path is not None:
            run.append_text("train.log", f"FAILED: {reason}\n{traceback.format_exc()}")
        return reason

    def _keep(self, trial: optuna.Trial, result: TrialResult, run: RunFolder) -> float:
        value = self._value(result.best)
        best = best_trial(trial.study)
        mine = order(trial.study, value, trial.number)
        if run.path is not None and (best is None or mine < order(trial.study, best.value or 0.0, best.number)):
            result.save(run.path / BEST)
        trial.set_user_attr("best_epoch", result.best_epoch)
        return value

    def _value(self, found: Figures) -> float:
        return value(found.as_dict(), self.metric)


def _note_cost(trial: optuna.Trial, run: RunFolder) -> None:
    """What the trial took, however it ended. Memory of a CPU is that of the process so far."""
    learning = [event for event in run.events if event["event"] == "parameters"]
    memory = [event["memory_mib"] for event in run.events if event["event"] == "train"]
    if learning:
        parts = (part for part in learning[-1].values() if isinstance(part, dict))
        trial.set_user_attr("trainable_parameters", sum(part.get("trainable", 0) for part in parts))
    if memory:
        trial.set_user_attr("peak_memory_mib", round(max(memory)))
    if run.path is not None:
        trial.set_user_attr("folder", str(run.path))
