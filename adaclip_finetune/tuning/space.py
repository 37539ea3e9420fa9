"""What is tuned: `opt_params` as distributions of Optuna, and the values of a trial as settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ValidationError

from adaclip_finetune.config import Config
from adaclip_finetune.config.base import Contradictions, Settings
from adaclip_finetune.config.layers import nearest, together
from adaclip_finetune.config.optuna import TunedSetting
from adaclip_finetune.config.roles import names_with
from adaclip_finetune.config.schema import described, show
from adaclip_finetune.errors import UserError

Space = dict[str, BaseDistribution]
"""Dotted setting name -> the distribution that its values are drawn from."""


class ImpossibleValues(Exception):
    """Values that the settings refuse, with the reason; `together` if each of them is allowed by itself."""

    def __init__(self, message: str, together: bool) -> None:
        super().__init__(message)
        self.together = together


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


def grid(space: Space) -> dict[str, list[Any]]:
    """Return all values of each setting, for GridSampler. Raise UserError for a range without a step."""
    return {name: _all_values(name, distribution) for name, distribution in space.items()}


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return the settings of a single training with `values` (by dotted names) in place of the config's own.

    Raise ImpossibleValues.
    """
    data = config.model_dump(exclude_unset=True, exclude={"optuna_cfg", "do_training_af_optuna"})
    for name, value in values.items():
        *above, last = name.split(".")
        part, section = data, config
        for step in above:
            section = getattr(section, step)
            part = part.setdefault(step, section.model_dump())
        part[last] = value
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        reasons = [problem.get("ctx", {}).get("error", problem["msg"]) for problem in error.errors()]
        contradict = all(isinstance(reason, Contradictions) for reason in reasons)
        raise ImpossibleValues("; ".join(map(str, reasons)), contradict) from None


def tunable() -> frozenset[str]:
    """Return the names of the settings that decide what is learned, except paths."""
    return names_with("view", "model", "method", "optimisation", paths=False)


def _distribution(config: Config, name: str, tuned: TunedSetting) -> BaseDistribution:
    """Return the distribution of one setting. Raise ValueError."""
    kind = _type_of(config, name)
    values = tuned.choices or tuned.range or ()
    if tuned.range and kind not in ("integer", "number"):
        raise ValueError("is not a number and has no range; give choices")
    if tuned.range and kind == "integer":
        if any(value != int(value) for value in (*values, tuned.step or 1)):
            raise ValueError("is an integer; range and step must be integers too")
        values = tuple(map(int, values))
    for value in values:
        try:
            with_values(config, {name: value})
        except ImpossibleValues as error:
            if not error.together:  # else it may fit other values that are tuned, or the trial is pruned
                raise ValueError(f"{show(value)} is not allowed: {error}") from None
    if tuned.choices:
        if len(set(map(show, values))) < len(values):
            raise ValueError("a value occurs twice in choices; remove one")
        return CategoricalDistribution(values)
    low, high = values
    count = (high - low) / (tuned.step or 1)
    if tuned.step and abs(count - round(count)) > 1e-6:  # Optuna would lower the end of the range
        raise ValueError(f"steps of {tuned.step:g} do not lead from {low:g} to {high:g}")
    if kind == "integer":
        return IntDistribution(low, high, log=tuned.log, step=int(tuned.step or 1))
    return FloatDistribution(low, high, log=tuned.log, step=tuned.step)


def _type_of(config: Config, name: str) -> str:
    """Return the type of a setting as JSON Schema calls it. Raise ValueError for a setting that cannot be tuned."""
    *above, last = name.split(".")
    section: Any = config
    for step in above:
        section = getattr(section, step, None)
    one = described(type(section) if isinstance(section, Settings) else Settings).get(last)
    if one is None:
        known = described(Config)
        if name in known:
            raise ValueError(f"there is no such setting with {above[0]}.method {getattr(config, above[0]).method}")
        raise ValueError(f"there is no such setting; the nearest is {nearest(name, known)}")
    if name.split(".")[0] not in tunable():
        raise ValueError("no trained weight depends on it, so it is the same in all trials")
    kind = str(one.types[0].get("type"))
    if kind not in ("integer", "number", "string", "boolean") or last == "method":
        raise ValueError("is not a single value; tune the settings inside it, each by its own name")
    return kind


def _all_values(name: str, distribution: Any) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if distribution.log or distribution.step is None:
        raise UserError(f"optuna_cfg.opt_params.{name}: GridSampler needs choices, or a range with a step and no log")
    low, high, step = distribution.low, distribution.high, distribution.step
    values = [min(round(low + i * step, 12), high) for i in range(round((high - low) / step) + 1)]
    return [int(value) for value in values] if isinstance(distribution, IntDistribution) else values
