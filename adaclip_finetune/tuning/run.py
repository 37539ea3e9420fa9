"""Hyperparameter tuning (`optuna_cfg`): trials until there are enough, a report, and a final run if asked for."""

from __future__ import annotations

import json
import os
import time
import traceback
import warnings
from math import prod
from pathlib import Path

import optuna
from accelerate.utils.memory import clear_device_cache
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.optuna import TunedSetting
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.config.schema import show
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.base import Figures, value
from adaclip_finetune.lock import FolderLock
from adaclip_finetune.training.device import launched_processes
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.signals import StopSignals
from adaclip_finetune.training.trainer import fit, run_trial
from adaclip_finetune.tuning.report import StudyFolder, best_trial, draw, rank
from adaclip_finetune.tuning.space import ImpossibleValues, Space, build_space, grid, with_values
from adaclip_finetune.tuning.study import (
    SILENCE_S,
    SURPLUS,
    DeadTrials,
    check_sampler,
    heartbeat,
    open_storage,
    open_study,
    place,
    points,
    retry,
    storage_error,
    study_name,
    without_password,
)

FAILURES = 5
"""So many failed trials in a row end a study."""

FINAL_RUN = "final_run"
"""The user attribute of a study that names the trial, the folder and the metrics of the final run."""

WAIT_S = 2.0
"""Seconds between two looks at the trials of other processes."""


def describe(config: Config) -> list[str]:
    """Return what would be tuned, in lines of text. Raise UserError if `optuna_cfg` cannot be carried out."""
    settings = config.optuna_cfg
    assert settings is not None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = build_space(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        check_sampler(config, space)
    size = f" ({_grid_size(space)} points)" if settings.sampler.name == "GridSampler" else ""
    return [
        f"study {study_name(config)}, {settings.n_trials} trials: {config.tuned_figure} on validation, "
        f"{settings.sampler.name}{size}, pruner {settings.pruner}",
        *(f"  {name}: {_in_words(tuned)}" for name, tuned in settings.opt_params.items()),
    ]


def tune(config: Config) -> None:
    """Run trials until `n_trials` of the study are finished, report on them and, if asked for, train the final run.

    The same call continues a study, and several processes may work on one. Raise UserError, Interrupted.
    """
    settings = config.optuna_cfg
    assert settings is not None
    if launched_processes() > 1:
        raise UserError(
            "optuna_cfg: a trial runs in one process. To use several, start the command several times without torchrun "
            "or accelerate launch (docs/tuning.md)"
        )
    lines, space = describe(config), build_space(config)
    if config.do_training_af_optuna and config.test_annot is not None:
        evaluation_split(config, config.test_annot)  # a test set that cannot be read is reported now
    with warnings.catch_warnings(), StopSignals(saving=False), open_storage(settings.storage) as storage:
        warnings.simplefilter("ignore", ExperimentalWarning)
        study = open_study(config, space, storage)
        folder = StudyFolder(config, study)
        folder.say_start([*lines, f"watch it: optuna-dashboard {without_password(settings.storage)}"])
        try:
            _run_trials(config, space, study, folder)
            _finish(config, study, folder)
        except KeyboardInterrupt:
            folder.write()
            folder.say("Interrupted. The same command continues; an interrupted trial begins again.")
            raise
        except UserError:
            raise
        except Exception as error:  # Optuna ends in various errors when its storage fails
            try:
                is_there = study.study_name in optuna.get_all_study_names(storage)
            except Exception as broken:
                raise storage_error(settings.storage, broken) from error
            if isinstance(error, StorageInternalError | SQLAlchemyError):
                raise storage_error(settings.storage, error) from error
            if is_there:
                raise
            raise UserError(
                f"optuna_cfg.storage: the study {study.study_name} was deleted or renamed while this command used it; "
                "run the command again to start a new one"
            ) from error


def _run_trials(config: Config, space: Space, study: optuna.Study, folder: StudyFolder) -> None:
    assert config.optuna_cfg is not None
    n_trials, storage = config.optuna_cfg.n_trials, config.optuna_cfg.storage
    if config.optuna_cfg.sampler.name == "GridSampler":
        n_trials = min(n_trials, _grid_size(space))
    # Test data are not read, and nothing is left that only a single run needs.
    single = {"test_annot": None, "save_last": False, "save_similarity": None, "tensorboard_dir": None}
    config = config.model_copy(update=single)
    began, ended, failures, waiting = time.monotonic(), 0, list[str](), False
    alone = looked_twice = storage.startswith("sqlite")
    dead = DeadTrials(study, 0.0 if alone else SILENCE_S)
    while True:
        dead.retry()
        begun = points(study.get_trials(deepcopy=False))
        left = n_trials - sum(trial.state.is_finished() for trial in begun)
        if left <= 0 and looked_twice:
            return
        if left <= 0:  # another process may have failed a dead trial, and be about to enqueue its values again
            looked_twice = True
            time.sleep(WAIT_S)
            continue
        looked_twice = alone
        if len(begun) >= n_trials and not any(trial.state == TrialState.WAITING for trial in begun):
            if not waiting:
                folder.say("waiting for the trials of other processes")
            waiting = True
            time.sleep(WAIT_S)
            continue
        trial = _run_trial(config, space, study, folder, n_trials)
        clear_device_cache(garbage_collection=True)  # else the next model is built beside the last one
        folder.write()
        if trial is None:
            continue
        ended += 1
        minutes = max(1, round((time.monotonic() - began) / ended * (left - 1) / 60))
        folder.say_end(trial, f"{left - 1} to go, about {minutes} min" if left > 1 else "")
        failures = [*failures, trial.user_attrs["reason"]] if trial.state == TrialState.FAIL else []
        if len(failures) == FAILURES:
            raise UserError(f"{FAILURES} trials in a row failed:\n  " + "\n  ".join(failures))


def _run_trial(
    config: Config, space: Space, study: optuna.Study, folder: StudyFolder, n_trials: int
) -> FrozenTrial | None:
    """Run one trial and return it, or None if it does not count, because another process ended it or began the last
    trial at the same time."""
    trial = study.ask(space)
    count = place(study.get_trials(deepcopy=False), trial.number) + 1
    if count > n_trials:
        trial.set_user_attr(SURPLUS, True)
        study.tell(trial, state=TrialState.FAIL)
        return None
    started = time.monotonic()
    try:
        with heartbeat(trial):
            folder.say_begin(trial, f"{count} of {n_trials}")
            try:
                found = _train(config, trial, folder)
                state = TrialState.FAIL if found is None else TrialState.COMPLETE
            except optuna.TrialPruned:
                found, state = None, TrialState.PRUNED
            trial.set_user_attr("seconds", round(time.monotonic() - started, 1))
        study.tell(trial, found, state)
    except KeyboardInterrupt:
        retry(study, trial.number)
        raise
    except UpdateFinishedTrialError:
        folder.say(f"  trial {trial.number} was taken for dead, and another process ended it")
        return None
    return study.trials[trial.number]


def _train(config: Config, trial: optuna.Trial, folder: StudyFolder) -> float | None:
    """Train with the values of the trial and return the best validation metric, or None if that fails.

    A trial that fails or is pruned has the reason in its user attribute `reason`. Raise TrialPruned.
    """

    def report(epoch: int, figures: Figures) -> None:
        current = value(figures.as_dict(), config.tuned_figure)
        trial.report(current, epoch)
        if trial.should_prune():
            trial.set_user_attr("reason", f"pruned after epoch {epoch}, with {current:.1f}")
            raise optuna.TrialPruned

    try:
        single = with_values(config, trial.params)
    except ImpossibleValues as error:
        trial.set_user_attr("reason", f"refused: {error}")
        raise optuna.TrialPruned from None
    with Path(os.devnull).open("w", encoding="utf-8") as silent:
        run = RunFolder(single, stream=silent, trial=folder.of_trial(trial.number))
        try:
            result = run_trial(single, run, report)
        except (optuna.TrialPruned, UpdateFinishedTrialError, StorageInternalError, SQLAlchemyError):
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            trial.set_user_attr("reason", reason)
            if run.path is not None:
                run.append_text("train.log", f"FAILED: {reason}\n{traceback.format_exc()}")
            return None
        finally:
            _record_cost(trial, run)
    trial.set_user_attr("best_epoch", result.best_epoch)
    found, best = value(result.best.as_dict(), config.tuned_figure), best_trial(trial.study)
    if run.path is not None and (best is None or rank(trial.study, found) < rank(trial.study, best.value)):
        result.save(run.path / "best.safetensors")
    return found


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


def _finish(config: Config, study: optuna.Study, folder: StudyFolder) -> None:
    """Write and print what the study found, and train the final run if asked for."""
    folder.write()
    if folder.path is not None:
        draw(study, folder.path, config.tuned_figure)
    for line in folder.summary():
        folder.say(line)
    best = best_trial(study)
    if not config.do_training_af_optuna:
        return
    if best is None:
        raise UserError("do_training_af_optuna: no trial completed, so there are no best values to train with")
    lock = FolderLock(folder.path) if folder.path else None
    try:
        if lock is not None:
            lock.take()
    except UserError as error:  # several processes reach the end of a study together
        folder.say(f"another process trains the final run: {error}")
        return
    try:
        _train_best(config, study, best, folder)
    finally:
        if lock is not None:
            lock.release()


def _train_best(config: Config, study: optuna.Study, best: FrozenTrial, folder: StudyFolder) -> None:
    """Train with the values of the best trial, unless that was done before; continue a run that was interrupted."""
    known = study.user_attrs.get(FINAL_RUN, {})
    earlier = Path(known["folder"]) if known.get("trial") == best.number and known.get("folder") else None
    folder.say(f"final run with the values of trial {best.number}" + (f": {earlier}" if earlier else ""))
    if earlier is not None and (earlier / "metrics.json").is_file():
        return

    def opened(run: Path) -> None:
        study.set_user_attr(FINAL_RUN, {"trial": best.number, "folder": str(run)})
        about = {"study": study.study_name, "folder": str(folder.path), "trial": best.number}
        write_durably(run / "study.json", (json.dumps(about, indent=2) + "\n").encode())

    if earlier is not None and (earlier / "config.json").is_file():
        result = fit(continued_config(load_config(None, {"resume": str(earlier)})), folder=earlier)
    else:
        result = fit(with_values(config, best.params), opened=opened)
    found = {"folder": result.folder and str(result.folder), result.evaluated_on: result.final.as_dict()}
    study.set_user_attr(FINAL_RUN, {"trial": best.number, **found})


def _in_words(tuned: TunedSetting) -> str:
    if tuned.range is None:
        return "one of " + ", ".join(map(show, tuned.choices or ()))
    step = f", step {tuned.step:g}" if tuned.step else ""
    return f"{tuned.range[0]:g} to {tuned.range[1]:g}" + (", logarithmic" if tuned.log else step)


def _grid_size(space: Space) -> int:
    return prod(len(values) for values in grid(space).values())
