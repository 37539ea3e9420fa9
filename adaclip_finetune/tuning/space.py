"""What is tuned: `opt_params` as distributions of Optuna, and the values of a trial as settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ValidationError

from adaclip_finetune.config import Config
from adaclip_finetune.config.layers import merged, nearest, together
from adaclip_finetune.config.optuna import TunedSetting
from adaclip_finetune.config.roles import names_with
from adaclip_finetune.config.schema import described, show
from adaclip_finetune.errors import UserError

Space = dict[str, BaseDistribution]
"""Dotted setting name -> the distribution that its values are drawn from."""


def build_space(config: Config) -> Space:
    """Return the space that `config.optuna_cfg` describes.

    Raise UserError with a list of every setting in it that cannot be tuned that way.
    """
    assert config.optuna_cfg is not None
    space: Space = {}
    problems: list[str] = []
    for name, tuned in config.optuna_cfg.opt_params.items():
        try:
            space[name] = _distribution(config, name, tuned)
        except ValueError as error:
            problems.append(f"optuna_cfg.opt_params.{name}: {error}")
    if config.auto_batch_size and "batch_size" in space:
        problems.append("optuna_cfg.opt_params.batch_size: auto_batch_size would change the value; remove one of them")
    if problems:
        raise UserError(together(problems))
    return space


def suggest(trial: optuna.Trial, space: Space) -> None:
    """Let the sampler choose a value of each setting, which becomes part of `trial.params`."""
    for name, of in space.items():
        if isinstance(of, CategoricalDistribution):
            trial.suggest_categorical(name, of.choices)
        elif isinstance(of, IntDistribution):
            trial.suggest_int(name, of.low, of.high, step=of.step, log=of.log)
        elif isinstance(of, FloatDistribution):
            trial.suggest_float(name, of.low, of.high, step=of.step, log=of.log)


def grid(space: Space) -> dict[str, list[Any]]:
    """Return all values of each setting, for GridSampler. Raise UserError for a range without a step."""
    values: dict[str, list[Any]] = {}
    for name, of in space.items():
        if isinstance(of, CategoricalDistribution):
            values[name] = list(of.choices)
        elif isinstance(of, IntDistribution):
            values[name] = list(range(of.low, of.high + 1, of.step))
        elif isinstance(of, FloatDistribution) and of.step is not None:
            values[name] = [round(of.low + i * of.step, 12) for i in range(round((of.high - of.low) / of.step) + 1)]
        else:
            raise UserError(f"optuna_cfg.opt_params.{name}: GridSampler needs choices, or a range with a step")
    return values


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return the settings of a single training with `values` (by dotted names) in place of the config's own.

    Raise pydantic's ValidationError.
    """
    own = config.model_dump(exclude_unset=True, exclude={"optuna_cfg", "do_training_af_optuna"})
    return Config.model_validate(merged(Config, own, values))


def refusal(error: ValidationError) -> str:
    """Return in one line why values were refused."""
    return "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())


def tunable() -> frozenset[str]:
    """Return the names of the settings that decide what is learned, except paths."""
    return names_with("view", "model", "method", "optimisation", paths=False)


def _distribution(config: Config, name: str, tuned: TunedSetting) -> BaseDistribution:
    """Return the distribution of one setting. Raise ValueError for a setting that cannot be tuned that way."""
    known, section = described(Config), name.split(".")[0]
    if name not in known:
        raise ValueError(f"there is no such setting; the nearest is {nearest(name, known)}")
    owners = known[name].methods
    if owners and getattr(config, section).method not in owners:
        raise ValueError(f"is a setting of {section}.method {' or '.join(owners)}")
    if section not in tunable():
        raise ValueError("no trained weight depends on it, so it is the same in all trials")
    kind = known[name].types[0].get("type")
    if kind not in ("integer", "number", "string", "boolean") or name.endswith(".method"):
        raise ValueError("is not a single value; tune the settings inside it, each by its own name")
    values: tuple[Any, ...] = tuned.choices or tuned.range or ()
    if tuned.range and kind == "integer":
        if tuned.step and tuned.step % 1:
            raise ValueError("is an integer, and so must be step")
        values = tuple(int(value) if value == int(value) else value for value in values)
    for value in values:
        try:
            with_values(config, {name: value})
        except ValidationError as error:
            # Errors without a location are contradictions: the value may fit others that are tuned.
            if any(problem["loc"] for problem in error.errors()):
                raise ValueError(f"{show(value)} is not allowed: {refusal(error)}") from None
    if tuned.choices:
        return CategoricalDistribution(values)
    low, high = values
    if kind == "integer":
        return IntDistribution(low, high, log=tuned.log, step=int(tuned.step or 1))
    return FloatDistribution(low, high, log=tuned.log, step=tuned.step)
