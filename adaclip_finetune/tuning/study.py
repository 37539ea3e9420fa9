"""A study: where it is stored, how its trials are counted and drawn, and what all of them have in common.

A trial that was interrupted, or whose process died, is tried again: Optuna's RetryHeartbeatStaleTrialCallback enqueues
a new trial with the same values. The chain of trials of the same values is called a point. Optuna's own heartbeats
exist for databases only, so a running trial keeps its heartbeat in a user attribute, which journal files have too.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, PercentilePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from adaclip_finetune.config import Config
from adaclip_finetune.config.optuna import OptunaSettings
from adaclip_finetune.config.roles import names_with, on_resume
from adaclip_finetune.config.schema import show
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.queries import evaluation_queries, fingerprint, train_entries
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import Lock
from adaclip_finetune.training.run_folder import RunFolder, new_folder
from adaclip_finetune.training.trainer import validation_zero_shot
from adaclip_finetune.tuning.space import Space, grid

FOLDER, ZERO_SHOT, SETTINGS = "folder", "zero_shot", "settings"  # user attributes of a study
SURPLUS, HEARTBEAT = "surplus", "heartbeat"  # user attributes of a trial
HEARTBEAT_S = 20.0
SILENCE_S = 120.0
"""A running trial whose heartbeat has not changed for so long is taken for dead."""

ATTEMPTS = 3
"""Values are not tried again after so many lost trials, the last of them by a dead process."""


# ---- where a study is stored ----


def without_password(url: str) -> str:
    """Return the URL of a storage as it may be printed."""
    return re.sub(r"(://[^:/@]*:).*(?=@)|(?<=password=)[^&]*", r"\1***", url)


@contextmanager
def open_storage(url: str) -> Iterator[BaseStorage]:
    """Open an SQLite file or a database server by its URL, or a journal file by its path.

    An SQLite file is locked against other processes. Raise UserError if the storage cannot be used.
    """
    with ExitStack() as stack:
        try:
            if url.startswith("sqlite") and (path := make_url(url).database):
                database = Path(path).resolve()
                lock = Lock(database.with_name(f".{database.name}.lock"), database)
                lock.take()
                stack.callback(lock.release)
            if "://" in url:
                storage: BaseStorage = (rdb := _open_database(url))
                stack.callback(rdb.engine.dispose)
            else:  # Optuna's default lock is a symbolic link, which needs a privilege on Windows
                file_lock = JournalFileOpenLock(url) if os.name == "nt" else None
                storage = JournalStorage(JournalFileBackend(url, file_lock))
        except UserError:
            raise
        except Exception as error:  # Optuna, SQLAlchemy, the driver and the file system have errors of their own
            raise storage_error(url, error) from error
        yield storage


def _open_database(url: str) -> RDBStorage:
    # SQLite waits for other readers; servers close connections that were idle for long.
    options: Any = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    attempts = 0
    while True:
        attempts += 1
        try:
            return RDBStorage(url.replace("{", "{{").replace("}", "}}"), engine_kwargs=options)  # Optuna formats it
        except Exception as error:
            if attempts == 10 or not re.search("exists|duplicate", str(error), re.IGNORECASE):
                raise
            time.sleep(random.random())  # another process creates the tables at this moment


def storage_error(url: str, error: Exception) -> UserError:
    """Return the error to raise for a storage that fails, without a password."""
    cause = error.__cause__ or error
    text = " ".join(str(getattr(cause, "orig", None) or cause).split())
    if url.count("@") > 1 or ("@" in url and isinstance(cause, ValueError | ArgumentError)):
        # What was said may quote a part of the password.
        text = "not a URL; in a password write @ / : % as %40 %2F %3A %25"
    return UserError(
        f"optuna_cfg.storage: {without_password(url)} cannot be used ({type(cause).__name__}: {text}). "
        "Give a URL as in docs/tuning.md, or the path of a journal file"
    )


# ---- trials and points ----


def history(trial: FrozenTrial) -> list[int]:
    """Return the numbers of the earlier trials of the same point, the oldest first."""
    return RetryHeartbeatStaleTrialCallback.retry_history(trial)


def points(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the latest trial of each point."""
    retried = {number for trial in trials for number in history(trial)}
    return [trial for trial in trials if trial.number not in retried and SURPLUS not in trial.user_attrs]


def place(trials: Sequence[FrozenTrial], number: int) -> int:
    """Return how many points of the study began before the point of trial `number`.

    An interruption does not change the place, and no two points have the same.
    """
    first = [*history(trials[number]), number][0]
    return sum(not history(trial) and SURPLUS not in trial.user_attrs for trial in trials[:first])


def retry(study: optuna.Study, number: int, attempts: int | None = None) -> None:
    """Let a running trial fail, and enqueue its values again unless there were `attempts` trials of them. Do nothing if
    another process ended the trial."""
    max_retry = None if attempts is None else attempts - 1
    with suppress(ValueError, UpdateFinishedTrialError):
        study.tell(number, state=TrialState.FAIL)
        RetryHeartbeatStaleTrialCallback(max_retry=max_retry)(study, study.trials[number])


@contextmanager
def heartbeat(trial: optuna.Trial) -> Iterator[None]:
    """Renew the heartbeat of a trial every HEARTBEAT_S seconds."""
    ended = Event()

    def beat() -> None:
        while True:
            with suppress(Exception):  # a server may come back
                trial.set_user_attr(HEARTBEAT, time.time())
            if ended.wait(HEARTBEAT_S):
                return

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class DeadTrials:
    """Finds running trials whose process died."""

    def __init__(self, study: optuna.Study, silence_s: float) -> None:
        self._study, self._silence = study, silence_s
        self._seen: dict[int, tuple[Any, float]] = {}  # trial -> its heartbeat, and when this process first saw it

    def retry(self) -> None:
        """Fail dead trials and enqueue their values again; to be called while this process runs no trial."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            beat, now = trial.user_attrs.get(HEARTBEAT), time.monotonic()
            if trial.number not in self._seen or self._seen[trial.number][0] != beat:
                self._seen[trial.number] = (beat, now)
            if now - self._seen[trial.number][1] >= self._silence:
                retry(self._study, trial.number, ATTEMPTS)


# ---- how values are chosen, and which trials end early ----


class SeededSampler(BaseSampler):
    """Draws every trial by a new sampler, which is seeded by the place of the trial's point.

    The values follow from the seed and the trials before, whether or not the study was interrupted, and several
    processes draw different values.
    """

    def __init__(self, study: optuna.Study, make: Callable[[int], BaseSampler]) -> None:
        self._study, self._make = study, make
        self._sampler = make(0)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        # Hyperband's pruner gives samplers a `study` with a part of the trials.
        self._sampler = self._make(place(self._study.get_trials(deepcopy=False), trial.number))
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, distribution: Any) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, distribution)


def set_sampler(study: optuna.Study, config: Config, space: Space) -> None:
    """Let `study` draw values by the sampler that `optuna_cfg.sampler` names."""
    assert config.optuna_cfg is not None
    settings = config.optuna_cfg.sampler
    arguments = {"seed": config.seed, **(settings.model_extra or {})}
    seed, kind = arguments.pop("seed"), getattr(optuna.samplers, settings.name)

    def make(place: int) -> Any:
        if settings.name == "GridSampler":  # all trials must have the grid in the same order
            return kind(grid(space), seed=seed, **arguments)
        return kind(**arguments, seed=int(np.random.SeedSequence((seed, place)).generate_state(1)[0]))

    study.sampler = SeededSampler(study, make)


def check_sampler(config: Config, space: Space) -> None:
    """Raise UserError if the sampler refuses its arguments, at once or when it draws values."""
    assert config.optuna_cfg is not None
    settings = config.optuna_cfg.sampler
    rehearsal = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    try:
        # More random trials than samplers begin with, then two that the sampler draws.
        for n_trials in (12, 2):
            for number in range(n_trials):
                rehearsal.tell(rehearsal.ask(space), number)
            set_sampler(rehearsal, config, space)
    except UserError:
        raise
    except Exception as error:  # samplers raise whatever they stumble over
        known = ", ".join(inspect.signature(getattr(optuna.samplers, settings.name)).parameters)
        given = show(settings.model_extra)
        raise UserError(
            f"optuna_cfg.sampler: {settings.name} refuses {given} ({error}); its arguments are {known}"
        ) from error


def make_pruner(settings: OptunaSettings, num_epochs: int) -> BasePruner:
    """Return the pruner that `optuna_cfg.pruner` names. Its steps are epochs, from 1."""
    first = settings.n_warmup_steps + 1  # the first epoch after which a trial may be pruned
    pruners: dict[str, BasePruner] = {
        "median": MedianPruner(n_warmup_steps=first),
        "percentile": PercentilePruner(25.0, n_warmup_steps=first),
        "hyperband": HyperbandPruner(min_resource=first, max_resource=max(first, num_epochs)),
        "none": NopPruner(),
    }
    return pruners[settings.pruner]


# ---- the study of a config ----


def study_name(config: Config) -> str:
    """Return the name that was given, or `<dataset>-<method>`."""
    assert config.optuna_cfg is not None
    return config.optuna_cfg.study_name or f"{config.dataset}-{config.peft.method}"


def open_study(config: Config, space: Space, storage: BaseStorage) -> optuna.Study:
    """Return the study of `config`, created if there is none.

    Zero-shot CLIP is measured before a study is created, so that settings that cannot be used leave no study behind.
    Raise UserError if the study of this name has other settings or data.
    """
    assert config.optuna_cfg is not None
    name, mine = study_name(config), _in_common(config)
    if name not in optuna.get_all_study_names(storage):
        measured = validation_zero_shot(config, RunFolder(config.model_copy(update={"no_output": True})))
        direction: Any = "maximize" if config.figures[config.tuned_figure] else "minimize"
        parent = Path(config.output_dir) / config.dataset
        try:
            folder = None if config.no_output else new_folder(parent, f"{datetime.now():%Y%m%d-%H%M%S}-{name}")
        except OSError as error:
            raise UserError(f"output_dir: no folder can be created in {parent} ({error})") from error
        try:
            study = optuna.create_study(storage=storage, study_name=name, direction=direction)
        except DuplicatedStudyError:  # another process was faster
            if folder is not None:
                folder.rmdir()
        else:
            study.set_metric_names([f"{config.tuned_figure} on validation"])  # for optuna-dashboard
            study.set_user_attr(ZERO_SHOT, measured.as_dict() if measured else None)
            study.set_user_attr(FOLDER, folder and str(folder))
            study.set_user_attr(SETTINGS, mine)
    pruner = make_pruner(config.optuna_cfg, config.num_epochs)
    study = optuna.load_study(storage=storage, study_name=name, pruner=pruner)
    set_sampler(study, config, space)
    for _ in range(20):  # the process that created the study may still be writing its attributes
        if SETTINGS in study.user_attrs or study.get_trials(deepcopy=False):
            break
        time.sleep(0.5)
    known = study.user_attrs.get(SETTINGS)
    another = "start a new study with another --optuna_cfg.study_name"
    if known is None:
        raise UserError(f"optuna_cfg.study_name: the study {name} was created by another program; {another}")
    if differ := [
        f"\n  {setting} is {show(mine.get(setting))} here but {show(known.get(setting))} in the study"
        for setting in sorted(mine.keys() | known.keys())
        if mine.get(setting) != known.get(setting)
    ]:
        raise UserError(
            f"optuna_cfg.study_name: the study {name} has other settings, and its trials cannot be compared:"
            f"{''.join(differ)}\nUse the settings of the study, or {another}"
        )
    return study


def _in_common(config: Config) -> dict[str, Any]:
    """Return everything that the value of any trial depends on, as it comes back from JSON."""
    assert config.optuna_cfg is not None and config.train_annot is not None and config.val_annot is not None
    common: dict[str, Any] = config.model_dump(mode="json", exclude={*on_resume("free"), *names_with("run")})
    tuned = config.optuna_cfg.model_dump(mode="json", include=set(names_with("optimisation", of=OptunaSettings)))
    common |= {f"optuna_cfg.{name}": value for name, value in tuned.items()}
    data = fingerprint(
        train_entries(load_annotations(config.train_annot, config.data_subset), config.concat_captions),
        validation=evaluation_queries(load_annotations(config.val_annot), config.concat_captions),
    )
    common |= {f"the {name} data": digest[:12] for name, digest in data.items()}
    for name in ("clip_weights", "policy_weights", "resume"):
        if (path := getattr(config, name)) and Path(path).exists():
            digest = hashlib.sha256()
            for file in filter(Path.is_file, sorted(Path(path).iterdir()) if Path(path).is_dir() else [Path(path)]):
                digest.update(file.read_bytes())
            common[f"the content of {name}"] = digest.hexdigest()[:12]
    return common
