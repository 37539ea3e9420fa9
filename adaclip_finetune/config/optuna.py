"""The settings of a hyper-parameter search, `optuna_cfg`; whether they fit the others is asked in `tuning/`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from adaclip_finetune.config.base import Settings, setting

Interval = Annotated[tuple[float, float], Field(strict=False)]


def _values(choices: tuple[Any, ...]) -> tuple[Any, ...]:
    if not choices or not all(isinstance(choice, bool | int | float | str | None) for choice in choices):
        raise ValueError("no list of single values")
    return choices


Choices = Annotated[tuple[Any, ...], Field(strict=False), AfterValidator(_values)]


class SamplerSettings(Settings):
    """The Optuna sampler by its class name; the arguments of the class may stand beside the name."""

    model_config = ConfigDict(extra="allow")

    name: Literal["TPESampler", "CmaEsSampler", "GPSampler", "RandomSampler", "GridSampler"] = setting(
        "TPESampler", "the Optuna sampler"
    )


class SearchSpace(Settings):
    """Among what one setting is searched: a range, or choices."""

    range: Interval | None = setting(None, "lowest and highest value, both included")
    log: bool = setting(False, "search the range on a logarithmic scale")
    step: float | None = setting(
        None, "distance of two values in the range; null: 1 for a whole number, else none", gt=0
    )
    choices: Choices | None = setting(
        None,
        "values to choose from, instead of a range",
        allowed="a list of values, each a number, a text, true, false or null",
    )

    @model_validator(mode="after")
    def _check(self) -> SearchSpace:
        if (self.range is None) == (self.choices is None):
            raise ValueError("a setting is searched in a range or among choices: give one of the two")
        if self.range is None:
            if self.log or self.step is not None:
                raise ValueError("log and step belong to a range, not to choices")
            return self
        low, high = self.range
        if low >= high:
            raise ValueError(f"range [{low:g}, {high:g}] has no room: the first value is to be lower than the second")
        if self.log and low <= 0:
            raise ValueError(f"log needs a range above 0, and range begins at {low:g}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other")
        return self


class OptunaSettings(Settings):
    """A hyper-parameter search around the training."""

    n_trials: int = setting(
        30, "finished trials in all, those of earlier commands too", role="run", unit="trials", ge=1
    )
    n_warmup_steps: int = setting(0, "first epochs, in which no trial is pruned", role="run", unit="epochs", ge=0)
    sampler: SamplerSettings = setting(
        {}, "how the next point is chosen: name, and arguments of that class", role="run"
    )
    pruner: Literal["median", "hyperband", "percentile", "none"] = setting(
        "median",
        "which trials are ended early: below the median, below the best quarter, by halving, or none",
        role="run",
    )
    objective: str | None = setting(
        None,
        "the validation figure that is searched for its best, such as t2v.R@1; null: primary",
        role="optimisation",
    )
    storage: str = setting(
        "sqlite:///optuna.db",
        "where the study is kept: a URL of SQLite, PostgreSQL or MySQL, or the path of a journal file",
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
    opt_params: dict[str, SearchSpace] = setting(
        ..., "setting -> {range: [low, high], log, step} or {choices: [...]}", role="optimisation", min_length=1
    )
