"""The settings of hyperparameter tuning, `optuna_cfg`. Whether they fit the other settings is checked in `tuning/`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from adaclip_finetune.config.base import Settings, setting

Interval = Annotated[tuple[float, float], Field(strict=False)]


def _single_values(choices: tuple[Any, ...]) -> tuple[Any, ...]:
    if not choices or not all(isinstance(choice, bool | int | float | str | None) for choice in choices):
        raise ValueError("not a list of single values")
    return choices


Choices = Annotated[tuple[Any, ...], Field(strict=False), AfterValidator(_single_values)]


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
    step: float | None = setting(
        None, "distance between two values of the range; null: 1 for integers, otherwise none", gt=0
    )
    choices: Choices | None = setting(
        None,
        "values to choose from, instead of a range",
        allowed="a list of values, each a number, a text, true, false or null",
    )

    @model_validator(mode="after")
    def _check(self) -> TunedSetting:
        if (self.range is None) == (self.choices is None):
            raise ValueError("give either range or choices")
        if self.range is None:
            if self.log or self.step is not None:
                raise ValueError("log and step need a range; remove them, or replace choices by a range")
            return self
        low, high = self.range
        if low >= high:
            raise ValueError(f"range [{low:g}, {high:g}] is empty: the first value must be lower than the second")
        if self.log and low <= 0:
            raise ValueError(f"log needs a range above 0, but the range begins at {low:g}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other; remove one")
        return self


class OptunaSettings(Settings):
    """Hyperparameter tuning: many trainings with different values of some settings."""

    n_trials: int = setting(
        30, "total number of trials, including those of earlier commands", role="run", unit="trials", ge=1
    )
    n_warmup_steps: int = setting(0, "first epochs in which no trial is pruned", role="run", unit="epochs", ge=0)
    sampler: SamplerSettings = setting({}, "how values are chosen: name, and arguments of that class", role="run")
    pruner: Literal["median", "hyperband", "percentile", "none"] = setting(
        "median",
        "which trials end early: those below the median, those not in the best quarter, by halving, or none",
        role="run",
    )
    objective: str | None = setting(
        None,
        "the validation metric to optimize, such as t2v.R@1; null: primary",
        role="optimisation",
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
