"""The settings of hyperparameter tuning, `optuna_cfg`. Whether they fit the other settings is checked in `tuning/`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from adaclip_finetune.config.base import Settings, setting

Interval = Annotated[tuple[float, float], Field(strict=False)]
Choices = Annotated[tuple[bool | int | float | str | None, ...], Field(strict=False, min_length=1)]


class SamplerSettings(Settings):
    """The name of an Optuna sampler. Arguments of its class may stand beside the name."""

    model_config = ConfigDict(extra="allow")

    name: Literal["TPESampler", "CmaEsSampler", "GPSampler", "RandomSampler", "GridSampler"] = setting(
        "TPESampler", "the Optuna sampler"
    )


class TunedSetting(Settings):
    """The values that one setting may take: a range or a list of choices."""

    range: Interval | None = setting(None, "lowest and highest value, both included")
    log: bool = setting(False, "draw from the range on a logarithmic scale")
    step: float | None = setting(None, "distance of two values in the range; null: 1 for integers, else none", gt=0)
    choices: Choices | None = setting(
        None, "values to choose from, instead of a range", allowed="a list of numbers, texts, true, false or null"
    )

    @model_validator(mode="after")
    def _check(self) -> TunedSetting:
        if (self.range is None) == (self.choices is None):
            raise ValueError("give either range or choices")
        if self.range is None and (self.log or self.step is not None):
            raise ValueError("log and step need a range; remove them, or replace choices by a range")
        return self


class OptunaSettings(Settings):
    """Hyperparameter tuning: many trainings with different values of some settings."""

    n_trials: int = setting(
        30, "trials to complete or prune, including those of earlier commands", role="run", unit="trials", ge=1
    )
    n_warmup_steps: int = setting(0, "first epochs in which no trial is pruned", role="run", unit="epochs", ge=0)
    sampler: SamplerSettings = setting({}, "how values are chosen: name, and arguments of that class", role="run")
    pruner: Literal["median", "hyperband", "percentile", "none"] = setting(
        "median",
        "which trials end early: those below the median, those not in the best quarter, by halving, or none",
        role="run",
    )
    objective: str | None = setting(
        None, "the validation metric to optimize, such as t2v.R@1; null: primary", role="optimisation"
    )
    storage: str = setting(
        "sqlite:///optuna.db",
        "where the study is stored: a URL of SQLite, PostgreSQL or MySQL, or the path of a journal file",
        role="run",
        min_length=1,
        allowed="a URL such as sqlite:///optuna.db, or the path of a journal file",
    )
    study_name: str | None = setting(
        None,
        "name of the study in the storage; null: <dataset>-<method>",
        role="run",
        pattern=r"^\w[\w.-]{0,99}$",
        allowed="a name of letters, digits, dots, dashes and underscores",
    )
    opt_params: dict[str, TunedSetting] = setting(
        ..., "setting -> {range: [low, high], log, step} or {choices: [...]}", role="optimisation", min_length=1
    )
