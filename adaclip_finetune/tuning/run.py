"""Hyperparameter tuning (`optuna_cfg`): trials until there are enough, a report, and a final run if asked for."""

from __future__ import annotations

import io
import math
import time
import traceback
import warnings
from pathlib import Path

import optuna
from accelerate.utils.memory import clear_device_cache
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.config.schema import show
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.base import Figures, value
from adaclip_finetune.training.device import launched_processes
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.signals import StopSignals
from adaclip_finetune.training.trainer import fit, run_trial
from adaclip_finetune.tuning.report import StudyFolder, best_trial, draw
from adaclip_finetune.tuning.space import Space, build_space, refusal, suggest, with_values
from adaclip_finetune.tuning.study import (
    make_sampler,
    open_storage,
    open_study,
    storage_errors,
    study_name,
    without_password,
)

FAILURES = 5
"""So many failed trials in a row end a study."""

FINAL_RUN = "final_run"
"""The user attribute of a study that names the trial and the folder of the final run."""


def describe(config: Config) -> list[str]:
    """Return what would be tuned, in lines of text. Raise UserError if `optuna_cfg` cannot be carried out."""
    settings = config.optuna_cfg
    assert settings is not None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", ExperimentalWarning)
    make_sampler(config, build_space(config))
    return [
        f"study {study_name(config)}, {settings.n_trials} trials: {config.tuned_figure} on validation, "
        f"{settings.sampler.name}, pruner {settings.pruner}",
        *(f"  {name}: {show(tuned.model_dump(exclude_unset=True))}" for name, tuned in settings.opt_params.items()),
    ]


def tune(config: Config) -> None:
    """Run trials until `n_trials` of the study are completed or pruned, report on them and, if asked for, train the
    final run.

    The same call continues a study, and several processes may work on one. Raise UserError, Interrupted.
    """
    assert config.optuna_cfg is not None
    if launched_processes() > 1:
        raise UserError(
            "optuna_cfg: a trial runs in one process. To use several, start the command several times without torchrun "
            "or accelerate launch (docs/tuning.md)"
        )
    lines, space, url = describe(config), build_space(config), config.optuna_cfg.storage
    if config.do_training_af_optuna and config.test_annot is not None:
        evaluation_split(config, config.test_annot)  # a test set that cannot be read is reported now
    with StopSignals(saving=False):
        with storage_errors(url):
            storage = open_storage(url)
        study = open_study(config, storage)
        folder = StudyFolder(config, study)
        folder.say_start([*lines, f"watch it: optuna-dashboard {without_password(url)}"])
        try:
            with storage_errors(url):
                _run_trials(config, space, study, folder)
            folder.write()
            if folder.path is not None:
                draw(study, folder.path, config.tuned_figure)
            folder.say_summary()
            if config.do_training_af_optuna:
                _train_best(config, study)
        except KeyboardInterrupt:
            folder.write()
            print("Interrupted. The same command continues; an interrupted trial begins again.")
            raise


def _run_trials(config: Config, space: Space, study: optuna.Study, folder: StudyFolder) -> None:
    assert config.optuna_cfg is not None
    n_trials = config.optuna_cfg.n_trials
    # Test data are not read, and nothing is left that only a single run needs.
    single = {"test_annot": None, "save_last": False, "save_similarity": None, "tensorboard_dir": None}
    trial_config = config.model_copy(update=single)
    begun, failures = list[int](), list[str]()
    study.sampler = sampler = make_sampler(config, space)

    def objective(trial: optuna.Trial) -> float:
        if not begun:  # processes that begin together must not draw the same values, so the seed is that of a trial
            study.sampler = make_sampler(config, space, trial.number)
        begun.append(trial.number)
        suggest(trial, space)
        folder.say_begin(trial)
        started = time.monotonic()
        try:
            return _train(trial_config, trial, folder)
        except KeyboardInterrupt:
            RetryHeartbeatStaleTrialCallback()(study, study.trials[trial.number])
            trial.set_user_attr("reason", "interrupted")
            raise
        finally:
            trial.set_user_attr("seconds", round(time.monotonic() - started, 1))

    def after_trial(study: optuna.Study, trial: FrozenTrial) -> None:
        clear_device_cache(garbage_collection=True)  # else the next model is built beside the last one
        folder.write()
        folder.say_end(trial)
        if trial.state == TrialState.FAIL:
            failures.append(trial.user_attrs.get("reason", "its metric is not a number"))
        else:
            failures.clear()
        if len(failures) == FAILURES:
            raise UserError(f"{FAILURES} trials in a row failed:\n  " + "\n  ".join(failures))

    counted = (TrialState.COMPLETE, TrialState.PRUNED)
    enough = len(study.get_trials(deepcopy=False, states=counted)) >= n_trials
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    if isinstance(sampler, optuna.samplers.GridSampler) and sampler.is_exhausted(study) and not waiting:
        enough = True
    if not enough:
        study.optimize(objective, callbacks=[after_trial, MaxTrialsCallback(n_trials, counted)])


def _train(config: Config, trial: optuna.Trial, folder: StudyFolder) -> float:
    """Train with the values of the trial and return the best validation metric, or NaN if that fails.

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
    except ValidationError as error:
        trial.set_user_attr("reason", f"refused: {refusal(error)}")
        raise optuna.TrialPruned from None
    run = RunFolder(single, stream=io.StringIO(), trial=folder.of_trial(trial.number))
    try:
        result = run_trial(single, run, report)
    except optuna.TrialPruned:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        trial.set_user_attr("reason", reason)
        if run.path is not None:
            run.append_text("train.log", f"FAILED: {reason}\n{traceback.format_exc()}")
        return math.nan  # for Optuna, a trial that failed
    finally:
        _record_cost(trial, run)
    trial.set_user_attr("best_epoch", result.best_epoch)
    if run.path is not None:
        result.save(run.path / "best.safetensors")
    return value(result.best.as_dict(), config.tuned_figure)


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


def _train_best(config: Config, study: optuna.Study) -> None:
    """Train with the values of the best trial, unless that was done before; continue a run that was interrupted."""
    best = best_trial(study)
    if best is None:
        raise UserError("do_training_af_optuna: no trial completed, so there are no best values to train with")
    known = study.user_attrs.get(FINAL_RUN, {})
    earlier = Path(known["folder"]) if known.get("trial") == best.number and known.get("folder") else None
    print(f"final run with the values of trial {best.number}" + (f": {earlier}" if earlier else ""))
    if earlier is not None and (earlier / "metrics.json").is_file():
        return

    def opened(run: Path) -> None:
        study.set_user_attr(FINAL_RUN, {"trial": best.number, "folder": str(run)})

    if earlier is not None and (earlier / "config.json").is_file():
        fit(continued_config(load_config(None, {"resume": str(earlier)})), folder=earlier)
    else:
        fit(with_values(config, best.params), opened=opened)
