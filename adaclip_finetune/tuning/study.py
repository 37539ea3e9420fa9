"""A study: where it is stored, how values are chosen, which trials end early, and what all trials have in common."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, PercentilePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.exc import ArgumentError

from adaclip_finetune.config import Config
from adaclip_finetune.config.optuna import OptunaSettings
from adaclip_finetune.config.roles import deciding_values, names_with
from adaclip_finetune.config.schema import show
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.base import value
from adaclip_finetune.training.run_folder import RunFolder, new_folder
from adaclip_finetune.training.trainer import validation_zero_shot
from adaclip_finetune.tuning.space import Space, grid

FOLDER, ZERO_SHOT, SETTINGS = "folder", "zero_shot", "settings"  # user attributes of a study
HEARTBEAT_S = 40
SILENCE_S = 120
"""A running trial in a database is taken for dead when its heartbeat is that old."""


def without_password(url: str) -> str:
    """Return the URL of a storage as it may be printed."""
    return re.sub(r"(://[^:/@]*:).*(?=@)|(?<=password=)[^&]*", r"\1***", url)


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Raise every error of Optuna, its samplers and its storage as a UserError, which does not tell the password."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Optuna, SQLAlchemy, the driver and the file system have errors of their own
        cause = error.__cause__ or error
        text = " ".join(str(getattr(cause, "orig", None) or cause).split())
        if url.count("@") > 1 or ("@" in url and isinstance(cause, ValueError | ArgumentError)):
            # The text may quote a part of the password.
            text = "if this is no URL: in a password write @ / : % as %40 %2F %3A %25"
        what = f"optuna_cfg.storage {without_password(url)}, or output_dir, cannot be used"
        raise UserError(
            f"{what} ({type(cause).__name__}: {text}). If they are there and the study was not deleted, "
            "start the command again"
        ) from error


def open_storage(url: str) -> BaseStorage:
    """Open a database by its URL, or a journal file by its path.

    In a database, trials have a heartbeat; the values of a trial whose heartbeat stops are tried again, at most twice.
    """
    if "://" not in url:  # Optuna's default lock is a symbolic link, which needs a privilege on Windows
        return JournalStorage(JournalFileBackend(url, JournalFileOpenLock(url) if os.name == "nt" else None))
    # SQLite waits for other processes; servers close connections that were idle for long.
    options: Any = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    return RDBStorage(
        url.replace("{", "{{").replace("}", "}}"),  # Optuna formats it
        engine_kwargs=options,
        heartbeat_interval=HEARTBEAT_S,
        grace_period=SILENCE_S,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=2),
    )


def make_sampler(config: Config, space: Space, first_trial: int = 0) -> BaseSampler:
    """Return the sampler that `optuna_cfg.sampler` names, for the process that begins with trial `first_trial`.

    Raise UserError if the sampler refuses its arguments.
    """
    assert config.optuna_cfg is not None
    settings = config.optuna_cfg.sampler
    arguments: dict[str, Any] = {"seed": config.seed, **(settings.model_extra or {})}
    if settings.name == "GridSampler":  # all processes must have the grid in the same order
        arguments["search_space"] = grid(space)
    try:
        if settings.name != "GridSampler":
            arguments["seed"] += first_trial
        sampler: BaseSampler = getattr(optuna.samplers, settings.name)(**arguments)
    except Exception as error:  # samplers raise whatever they stumble over
        given = show(settings.model_extra)
        raise UserError(f"optuna_cfg.sampler: {settings.name} refuses {given} ({error})") from error
    return sampler


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


def study_name(config: Config) -> str:
    """Return the name that was given, or `<dataset>-<method>`."""
    assert config.optuna_cfg is not None
    return config.optuna_cfg.study_name or f"{config.dataset}-{config.peft.method}"


def open_study(config: Config, storage: BaseStorage) -> optuna.Study:
    """Return the study of `config`, created if there is none.

    Zero-shot CLIP is measured before a study is created, so that settings that cannot be used leave no study behind.
    Raise UserError if the study of this name has other settings.
    """
    assert config.optuna_cfg is not None
    name, settings, url = study_name(config), _in_common(config), config.optuna_cfg.storage
    with storage_errors(url):
        exists = name in optuna.get_all_study_names(storage)
    if not exists:
        measured = validation_zero_shot(config, RunFolder(config.model_copy(update={"no_output": True})))
        with storage_errors(url):
            before = value(measured.as_dict(), config.tuned_figure) if measured else None
            _create_study(config, name, storage, {ZERO_SHOT: before, SETTINGS: settings})
    with storage_errors(url):
        pruner = make_pruner(config.optuna_cfg, config.num_epochs)
        study = optuna.load_study(storage=storage, study_name=name, pruner=pruner)
        for _ in range(10):  # the process that created the study may still be writing its attributes
            if SETTINGS not in study.user_attrs:
                time.sleep(0.1)
        known = study.user_attrs.get(SETTINGS, {})
    if differ := [
        f"\n  {setting} is {show(settings.get(setting))} here but {show(known.get(setting))} in the study"
        for setting in sorted(settings.keys() | known.keys())
        if settings.get(setting) != known.get(setting)
    ]:
        raise UserError(
            f"optuna_cfg.study_name: the study {name} has other settings, and its trials cannot be compared:"
            f"{''.join(differ)}\nUse the settings of the study, or start a new one with another --optuna_cfg.study_name"
        )
    return study


def _create_study(config: Config, name: str, storage: BaseStorage, attributes: dict[str, Any]) -> None:
    """Create a study with its folder, unless another process has just done so."""
    parent = Path(config.output_dir) / config.dataset
    folder = None if config.no_output else new_folder(parent, f"{datetime.now():%Y%m%d-%H%M%S}-{name}")
    direction: Any = "maximize" if config.figures[config.tuned_figure] else "minimize"
    try:
        study = optuna.create_study(storage=storage, study_name=name, direction=direction)
    except DuplicatedStudyError:
        if folder is not None:
            folder.rmdir()
        return
    study.set_metric_names([f"{config.tuned_figure} on validation"])  # for optuna-dashboard
    for key, content in {FOLDER: folder and str(folder), **attributes}.items():
        study.set_user_attr(key, content)


def _in_common(config: Config) -> dict[str, Any]:
    """Return the settings on which the value of every trial depends, and a digest of each annotation."""
    assert config.optuna_cfg is not None and config.train_annot is not None and config.val_annot is not None
    common = deciding_values(config, ("train_annot", "val_annot"))
    del common["test_annot"]
    tuned = config.optuna_cfg.model_dump(mode="json", include=set(names_with("optimisation", of=OptunaSettings)))
    common |= {f"optuna_cfg.{name}": chosen for name, chosen in tuned.items()}
    return common
