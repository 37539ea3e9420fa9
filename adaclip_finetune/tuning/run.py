"""Hyperparameter tuning (`optuna_cfg`): trials until there are enough, a report, and a final run if asked for."""

from __future__ import annotations

import gc
import json
import time
import warnings
from math import prod
from pathlib import Path

import optuna
from accelerate.utils.memory import clear_device_cache
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import FolderLock
from adaclip_finetune.training.device import launched_processes
from adaclip_finetune.training.signals import StopSignals
from adaclip_finetune.training.trainer import fit
from adaclip_finetune.tuning.report import StudyFolder, best_trial, draw
from adaclip_finetune.tuning.space import Space, build_space, describe_space, grid, with_values
from adaclip_finetune.tuning.study import (
    SURPLUS,
    DeadTrials,
    OpenStorage,
    check_sampler,
    open_storage,
    open_study,
    points,
    retry,
    study_name,
)
from adaclip_finetune.tuning.trial import TrialFailed, TunedTraining

FAILURES = 5
"""So many failed trials in a row end a study."""

FINAL_RUN = "final_run"
"""The user attribute of a study that names the trial, the folder and the metrics of the final run."""

WAIT_S = 2.0
"""Seconds between two looks at the trials of other processes."""


def describe(config: Config) -> list[str]:
    """Return what would be tuned, in lines of text. Raises UserError if `optuna_cfg` cannot be carried out."""
    settings = config.optuna_cfg
    assert settings is not None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = build_space(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        check_sampler(config, space)
    size = f" ({_grid_size(space)} points)" if settings.sampler.name == "GridSampler" else ""
    return [
        f"study {study_name(config)}, {settings.n_trials} trials: {config.searched_figure} on validation, "
        f"{settings.sampler.name}{size}, pruner {settings.pruner}",
        *(f"  {line}" for line in describe_space(space)),
    ]


def tune(config: Config) -> None:
    """Run trials until `n_trials` of the study are finished, report on them and, if asked for, train the final run.

    The same call continues a study, and several processes may work on one. Raises UserError, Interrupted.
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
        study = open_study(config, space, storage.optuna)
        folder = StudyFolder(config, study)
        folder.say_start([*lines, f"watch it: optuna-dashboard {storage.shown}"])
        try:
            _run_trials(config, space, study, storage, folder)
            _finish(config, study, folder)
        except KeyboardInterrupt:
            folder.write()
            folder.say("Interrupted. The same command continues; an interrupted trial begins again.")
            raise
        except UserError:
            raise
        except Exception as error:  # Optuna ends in various errors when its storage fails
            try:
                is_there = study.study_name in optuna.get_all_study_names(storage.optuna)
            except Exception as broken:
                raise storage.error(broken) from error
            if isinstance(error, StorageInternalError | SQLAlchemyError):
                raise storage.error(error) from error
            if is_there:
                raise
            raise UserError(
                f"optuna_cfg.storage: the study {study.study_name} was deleted or renamed while this command used it; "
                "run the command again to start a new one"
            ) from error


def _run_trials(config: Config, space: Space, study: optuna.Study, storage: OpenStorage, folder: StudyFolder) -> None:
    assert config.optuna_cfg is not None
    n_trials = config.optuna_cfg.n_trials
    if config.optuna_cfg.sampler.name == "GridSampler":
        n_trials = min(n_trials, _grid_size(space))
    training = TunedTraining(config, space, folder, n_trials, storage.exclusive)
    dead, began, ended = DeadTrials(study, storage), time.monotonic(), 0
    failures, waiting = list[str](), False
    while True:
        dead.retry()
        begun = points(study.get_trials(deepcopy=False))
        left = n_trials - sum(trial.state.is_finished() for trial in begun)
        if left <= 0:
            return
        if len(begun) >= n_trials and not any(trial.state == TrialState.WAITING for trial in begun):
            if not waiting:
                folder.say("waiting for the trials of other processes")
            waiting = True
            time.sleep(WAIT_S)
            continue
        trial = _run_trial(study, training, folder)
        folder.write()
        if trial is None or SURPLUS in trial.user_attrs:
            continue
        ended += 1
        minutes = (time.monotonic() - began) / ended * (left - 1) / 60
        folder.say_end(trial.number, f"{left - 1} to go, about {minutes:.0f} min" if left > 1 else "")
        failures = [*failures, trial.user_attrs["reason"]] if trial.state == TrialState.FAIL else []
        if len(failures) == FAILURES:
            raise UserError(f"{FAILURES} trials in a row failed:\n  " + "\n  ".join(failures))


def _run_trial(study: optuna.Study, training: TunedTraining, folder: StudyFolder) -> FrozenTrial | None:
    """Run one trial and return it, or None if another process ended it."""
    training.number = None
    try:
        study.optimize(training, n_trials=1, catch=(TrialFailed,))
    except KeyboardInterrupt:
        if training.number is not None:
            stopped = study.trials[training.number]
            if stopped.state == TrialState.FAIL and not {"reason", SURPLUS} & stopped.user_attrs.keys():
                retry(study, stopped.number)
        raise
    except ValueError:  # Optuna's answer to the end of a trial that has ended
        if training.number is None or study.trials[training.number].state != TrialState.FAIL:
            raise
        folder.say(f"  trial {training.number} was taken for dead, and another process ended it")
        return None
    finally:  # no exception holds the model of the trial any more; the next one must not be built beside it
        gc.collect()
        clear_device_cache()
    assert training.number is not None
    return study.trials[training.number]


def _finish(config: Config, study: optuna.Study, folder: StudyFolder) -> None:
    folder.write()
    if folder.path is not None:
        try:
            draw(study, folder.path, config.searched_figure)
        except OSError as error:
            folder.say(f"WARNING: no pictures: {error}")
    for line in folder.summary():
        folder.say(line)
    if config.do_training_af_optuna:
        best = best_trial(study)
        if best is None:
            raise UserError("do_training_af_optuna: no trial completed, so there are no best values to train with")
        lock = None if folder.path is None else FolderLock(folder.path)
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


def _grid_size(space: Space) -> int:
    return prod(len(values) for values in grid(space).values())
