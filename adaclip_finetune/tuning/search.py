"""`search`: trials until enough are finished, by this process or by several on one study; then, if asked for, one run
with the best values."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.trial import FrozenTrial, TrialState

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.evaluate import Figures
from adaclip_finetune.training.device import launched_processes
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.signals import StopSignals
from adaclip_finetune.training.trial import validation_zero_shot
from adaclip_finetune.tuning.final import train_best
from adaclip_finetune.tuning.folder import StudyFolder, best_trial
from adaclip_finetune.tuning.ledger import counted, may_begin
from adaclip_finetune.tuning.pictures import draw_study
from adaclip_finetune.tuning.progress import Progress, summary
from adaclip_finetune.tuning.retries import requeue_lost
from adaclip_finetune.tuning.sampler import GridByPlace, make_sampler
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
    space = search_space(config)
    sampler = make_sampler(config, space)
    points = f", {sampler.size} points" if isinstance(sampler, GridByPlace) else ""
    return [
        f"study {study_name(config)}, {settings.n_trials} trials: {settings.objective} on validation, by "
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
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    lines, space = describe(config), search_space(config)
    with open_storage(settings.storage) as storage:
        study = open_study(config, space, storage.storage)
        folder = StudyFolder(config, study)
        for line in lines:
            folder.say(line)
        folder.say(f"watch it: optuna-dashboard {storage.shown}" + (f"   files: {folder.path}" if folder.path else ""))
        _zero_shot(config, study, folder)
        wanted = settings.n_trials
        if isinstance(study.sampler, GridByPlace):
            wanted = min(wanted, study.sampler.size)
        objective = Objective(config, space, folder, wanted, storage.alive)
        with storage.explained(study):
            with _told_how_to_go_on(study, folder):
                _run_trials(study, storage, objective, folder, wanted)
            _finish(config, study, folder)


def _run_trials(
    study: optuna.Study, storage: StudyStorage, objective: Objective, folder: StudyFolder, wanted: int
) -> None:
    progress, failures = Progress(wanted), list[str]()
    while True:
        storage.fail_dead(study)
        requeue_lost(study)
        trials = study.get_trials(deepcopy=False)
        if len(counted(trials)) >= wanted:
            return
        if not may_begin(trials, wanted):  # should another's process die, its point is to be tried again
            time.sleep(_WAIT)
            continue
        ended = _run_one(study, objective)
        folder.write(study)
        if "surplus" in ended.user_attrs:
            continue
        folder.say(progress.line(study, ended))
        failures = [*failures, str(ended.user_attrs["reason"])] if ended.state == TrialState.FAIL else []
        if len(failures) == _FAILURES:
            reasons = "\n".join(f"  {reason}" for reason in failures)
            raise UserError(f"{_FAILURES} trials in a row failed, and the search is stopped:\n{reasons}")


def _run_one(study: optuna.Study, objective: Objective) -> FrozenTrial:
    """One trial, to its end, and how it ended."""
    ended: list[FrozenTrial] = []
    study.optimize(
        objective, n_trials=1, catch=(Surplus, TrialFailed), callbacks=[lambda _, trial: ended.append(trial)]
    )
    return ended[0]


@contextmanager
def _told_how_to_go_on(study: optuna.Study, folder: StudyFolder) -> Iterator[None]:
    try:
        with StopSignals():
            yield
    except KeyboardInterrupt:
        requeue_lost(study)
        folder.write(study)
        folder.say("stopped. The same command goes on; the trial that was stopped is tried again")
        raise


def _zero_shot(config: Config, study: optuna.Study, folder: StudyFolder) -> None:
    """CLIP as it is, measured once a study with the config's own settings: what a search must beat."""
    if "zero_shot" not in study.user_attrs:
        measured = validation_zero_shot(config, RunFolder(config.model_copy(update={"no_output": True})))
        study.set_user_attr("zero_shot", measured.as_state() if measured else None)
    elif state := study.user_attrs["zero_shot"]:
        folder.say(f"zero-shot on validation: T2V R@1 {Figures.from_state(state).metrics.t2v.recall(1):.1f}")


def _finish(config: Config, study: optuna.Study, folder: StudyFolder) -> None:
    folder.write(study)
    if folder.path is not None:
        assert config.optuna_cfg is not None
        draw_study(study, folder.path, config.optuna_cfg.objective)
    for line in summary(config, study, folder):
        folder.say(line)
    best = best_trial(study)
    if config.do_training_af_optuna and best is not None:
        train_best(with_values(config, best.params), study, best, folder)
