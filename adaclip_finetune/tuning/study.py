"""The study in the storage: made, or found again, and never with settings that its trials did not have."""

from __future__ import annotations

import hashlib
import time
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.storages import BaseStorage
from optuna.study import Study

from adaclip_finetune.config import Config
from adaclip_finetune.config.optuna import OptunaSettings
from adaclip_finetune.config.roles import names_with, on_resume
from adaclip_finetune.config.schema import show
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.queries import evaluation_queries, fingerprint, train_entries
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.run_folder import new_folder
from adaclip_finetune.tuning.sampler import make_pruner, make_sampler
from adaclip_finetune.tuning.space import Space

FOLDER = "folder"
_SETTINGS = "settings"
_PATIENCE_S = 20


def open_study(config: Config, space: Space, storage: BaseStorage) -> Study:
    """The study of this config. Raises UserError where one of its name is of other settings or data, or of another
    program."""
    assert config.optuna_cfg is not None
    name, mine = study_name(config), _deciding(config)
    tools: Any = {"sampler": make_sampler(config, space), "pruner": make_pruner(config.optuna_cfg, config.num_epochs)}
    smaller = not config.figures[config.searched_figure]
    try:
        new: Any = {"direction": "minimize" if smaller else "maximize"}
        study = optuna.create_study(storage=storage, study_name=name, **new, **tools)
    except DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name, **tools)
    else:  # of several processes that begin together, one makes the study, and the folder of all
        if not config.no_output:
            study.set_user_attr(FOLDER, str(_new_folder(config, name)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names([f"{config.searched_figure} on validation"])  # what optuna-dashboard calls it
        study.set_user_attr(_SETTINGS, mine)
    known = _settings_of(study)
    if known is None:
        raise UserError(
            f"{_named(config)} was made by another program, or by a command that died at once; give another "
            "--optuna_cfg.study_name"
        )
    if differ := [
        f"{name} is {show(mine.get(name))} here, and {show(known.get(name))} in the study"
        for name in sorted(mine.keys() | known.keys())
        if mine.get(name) != known.get(name)
    ]:
        raise UserError(
            f"{_named(config)} was begun with other settings, and its trials cannot be compared with new ones:\n  "
            + "\n  ".join(differ)
            + "\nGive the same settings to go on, or another --optuna_cfg.study_name to begin anew"
        )
    return study


def study_name(config: Config) -> str:
    """As given, or `<dataset>-<method>`."""
    assert config.optuna_cfg is not None
    return config.optuna_cfg.study_name or f"{config.dataset}-{config.peft.method}"


def _settings_of(study: Study) -> dict[str, Any] | None:
    """Those it was begun with; who made it may still be writing them."""
    for _ in range(_PATIENCE_S):
        known: dict[str, Any] | None = study.user_attrs.get(_SETTINGS)
        if known is not None or study.get_trials(deepcopy=False):
            return known
        time.sleep(1.0)
    return None


def _new_folder(config: Config, name: str) -> Path:
    parent = Path(config.output_dir) / config.dataset
    try:
        return new_folder(parent, f"{datetime.now():%Y%m%d-%H%M%S}-{name}")
    except OSError as error:
        raise UserError(
            f"output_dir: cannot make a folder in {parent} ({error}); set output_dir or no_output"
        ) from error


def _named(config: Config) -> str:
    return f"optuna_cfg.study_name: the study {study_name(config)}"


def _deciding(config: Config) -> dict[str, Any]:
    """What the value of a trial depends on, as it comes back from JSON. Files are known by what is in them."""
    settings = config.model_dump(mode="json", exclude={*on_resume("free"), *names_with("run")})
    assert config.optuna_cfg is not None and config.train_annot is not None and config.val_annot is not None
    # How points are chosen, and how many, may change on the way: no trial's value depends on it.
    strategy = set(names_with("run", of=OptunaSettings))
    search = config.optuna_cfg.model_dump(mode="json", exclude=strategy)
    data = fingerprint(
        train_entries(load_annotations(config.train_annot, config.data_subset), config.concat_captions),
        validation=evaluation_queries(load_annotations(config.val_annot), config.concat_captions),
    )
    weights = {name: _digest(getattr(config, name)) for name in ("clip_weights", "policy_weights", "resume")}
    return (
        settings
        | {f"optuna_cfg.{name}": value for name, value in search.items()}
        | {f"the {name} data": digest[:12] for name, digest in data.items()}
        | {f"the content of {name}": digest for name, digest in weights.items() if digest}
    )


def _digest(name: str | None) -> str | None:
    """Of a file, or of the large files in a folder; None for what is no path."""
    if name is None or not Path(name).exists():
        return None
    path, digest = Path(name), hashlib.sha256()
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]
