"""The study in the storage: made, or found again, and never with settings that its trials did not have."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study

from adaclip_finetune.config import Config
from adaclip_finetune.continued import FREE
from adaclip_finetune.errors import UserError
from adaclip_finetune.settings.schema import show
from adaclip_finetune.tuning.sampler import make_pruner, make_sampler
from adaclip_finetune.tuning.space import Space

_SETTINGS = "settings"
# How points are chosen, and how many: may change on the way, since no trial's value depends on it.
_STRATEGY = {"n_trials", "n_warmup_steps", "sampler", "pruner", "storage", "study_name"}
_ELSEWHERE = {"output_dir", "tensorboard_dir", "no_output", "save_last", "save_similarity", "do_training_af_optuna"}


def open_study(config: Config, space: Space, storage: BaseStorage) -> Study:
    """The study of this config. Raises UserError where one of its name is of other settings, or of another program."""
    assert config.optuna_cfg is not None
    study = optuna.create_study(
        storage=storage,
        study_name=study_name(config),
        direction="minimize" if config.optuna_cfg.objective.split(".")[1] in ("MedR", "MeanR") else "maximize",
        sampler=make_sampler(config, space),
        pruner=make_pruner(config.optuna_cfg, config.num_epochs),
        load_if_exists=True,
    )
    mine, known = _deciding(config), study.user_attrs.get(_SETTINGS)
    if known is None:
        if study.get_trials(deepcopy=False):
            raise UserError(f"{_named(config)} holds trials of another program; give another --optuna_cfg.study_name")
        study.set_user_attr(_SETTINGS, mine)
    elif differ := [
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


def _named(config: Config) -> str:
    return f"optuna_cfg.study_name: the study {study_name(config)}"


def _deciding(config: Config) -> dict[str, Any]:
    """What the value of a trial depends on, as it comes back from JSON."""
    settings = config.model_dump(mode="json", exclude={*FREE, *_ELSEWHERE, "optuna_cfg"})
    assert config.optuna_cfg is not None
    search = config.optuna_cfg.model_dump(mode="json", exclude=_STRATEGY)
    return settings | {f"optuna_cfg.{name}": value for name, value in search.items()}
