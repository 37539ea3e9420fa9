"""`search`: trials until enough are finished, by this process or by several on one study; then, if asked for, one run
with the best values."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from accelerate.utils.memory import clear_device_cache
from optuna.trial import FrozenTrial, TrialState

from adaclip_finetune.config import Config
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.base import value
from adaclip_finetune.training.device import launched_processes
from adaclip_finetune.training.outcome import SELECTED_ON_TEST
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.signals import StopSignals
from adaclip_finetune.training.trainer import chosen_on_test, validation_zero_shot
from adaclip_finetune.tuning.final import train_best
from adaclip_finetune.tuning.folder import StudyFolder, best_trial
from adaclip_finetune.tuning.ledger import counted, may_begin
from adaclip_finetune.tuning.pictures import draw_study
from adaclip_finetune.tuning.progress import Progress, summary, without
from adaclip_finetune.tuning.retries import requeue_lost
from adaclip_finetune.tuning.sampler import GridByPlace, check_sampler
from adaclip_finetune.tuning.space import search_space, with_values
from adaclip_finetune.tuning.storage import StudyStorage, open_storage
from adaclip_finetune.tuning.study import open_study, study_name
from adaclip_finetune.tuning.trial import Objective, Surplus, TrialFailed

_FAILURES = 5  # in a row end a study
_WAIT = 2.0  # seconds, until others' trials are looked at again


def describe(config: Config) -> list[str]:
    """What would be searched, in lines, everything in it being checked. Raises UserError."""
    settings = config.optuna_cfg
    assert settings is not None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = search_space(config)
    sampler = check_sampler(config, space)
    points = f", {sampler.size} points" if isinstance(sampler, GridByPlace) else ""
    return [
        f"study {study_name(config)}, {settings.n_trials} trials: {config.searched_figure} on validation, by "
        f"{settings.sampler.name}{points}, pruner {settings.pruner}",
        *(f"  {line}" for line in space.describe()),
    ]


def search(config: Config) -> None:
    """Run trials, print and write what they find. Raises UserError, Interrupted."""
    settings = config.optuna_cfg
    assert settings is not None
    if launched_processes() > 1:
        raise UserError(
            "optuna_cfg: a trial runs in one process; to spread a search, start the command several times on one "
            "study (docs/search.md), without torchrun or accelerate launch"
        )
    lines, space = describe(config), search_space(config)
    with open_storage(settings.storage) as storage:
        study = open_study(config, space, storage.storage)
        folder = StudyFolder(config, study)
        for line in lines:
            folder.say(line)
        careful = " (a copy of it, or by a role that only reads: docs/search.md)" if storage.shared else ""
        folder.say(f"watch it: optuna-dashboard {storage.shown}{careful}")
        if folder.path is not None:
            folder.say(f"files: {folder.path}")
        if chosen_on_test(config):
            folder.say(f"WARNING: every figure of this search is {SELECTED_ON_TEST}")
        with storage.explained(study), _told_how_to_go_on(study, folder), StopSignals(saving=False):
            _look_ahead(config, study, folder)
            wanted = settings.n_trials
            if isinstance(study.sampler, GridByPlace):
                wanted = min(wanted, study.sampler.size)
            _run_trials(study, storage, Objective(config, space, folder, wanted, storage.alive), folder, wanted)
            _finish(config, study, folder)


def _run_trials(
    study: optuna.Study, storage: StudyStorage, objective: Objective, folder: StudyFolder, wanted: int
) -> None:
    progress, failures, waiting = Progress(wanted), list[str](), False
    while True:
        storage.fail_dead(study)
        requeue_lost(study)
        trials = study.get_trials(deepcopy=False)
        if len(counted(trials)) >= wanted:
            return
        if not may_begin(trials, wanted):  # should another's process die, its point is to be tried again
            if not waiting:
                folder.say("waiting for the trials of other processes")
            waiting = True
            time.sleep(_WAIT)
            continue
        waiting = False
        ended = _run_one(study, objective, folder)
        folder.write(study)
        if ended is None or "surplus" in ended.user_attrs:
            continue
        folder.say(progress.line(study, ended))
        failures = [*failures, str(ended.user_attrs["reason"])] if ended.state == TrialState.FAIL else []
        if len(failures) == _FAILURES:
            reasons = "\n".join(f"  {reason}" for reason in failures)
            raise UserError(f"{_FAILURES} trials in a row failed, and the search is stopped:\n{reasons}")


def _run_one(study: optuna.Study, objective: Objective, folder: StudyFolder) -> FrozenTrial | None:
    """One trial, to its end, and how it ended; None if another process ended it."""
    ended: list[FrozenTrial] = []
    try:
        study.optimize(
            objective, n_trials=1, catch=(Surplus, TrialFailed), callbacks=[lambda _, trial: ended.append(trial)]
        )
    except Exception as error:
        if objective.taken_away is None:
            raise error
        folder.say(f"  trial {objective.taken_away} was taken for dead and ended by another process; going on")
        objective.taken_away = None
        return None
    finally:
        # Only now no exception holds the trial's model any more: the next one must not start beside it.
        gc.collect()
        clear_device_cache()
    return ended[0]


@contextmanager
def _told_how_to_go_on(study: optuna.Study, folder: StudyFolder) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        requeue_lost(study)
        folder.write(study)
        folder.say("stopped. The same command goes on; a trial that was stopped is tried again")
        raise


def _look_ahead(config: Config, study: optuna.Study, folder: StudyFolder) -> None:
    """CLIP as it is, measured once a study with the config's own settings, is what a search must beat; and a test that
    cannot be read is better told now than after the search."""
    if "zero_shot" not in study.user_attrs:
        measured = validation_zero_shot(config, RunFolder(config.model_copy(update={"no_output": True})))
        study.set_user_attr("zero_shot", measured.as_dict() if measured else None)
    elif found := study.user_attrs["zero_shot"]:
        figure = config.primary_figure
        folder.say(f"zero-shot on validation: {figure} {value(found, figure):.1f}{without(found)}")
    if config.do_training_af_optuna and config.test_annot is not None:
        evaluation_split(config, config.test_annot)


def _finish(config: Config, study: optuna.Study, folder: StudyFolder) -> None:
    assert config.optuna_cfg is not None
    folder.write(study)
    if folder.path is not None:
        try:
            draw_study(study, folder.path, config.searched_figure)
        except UserError as error:
            folder.say(f"WARNING: no pictures: {error}")
    for line in summary(config, study, folder):
        folder.say(line)
    if config.do_training_af_optuna:
        if (best := best_trial(study)) is None:
            raise UserError("do_training_af_optuna: no trial completed, so there are no best values to train with")
        train_best(with_values(config, best.params), study, best, folder)
