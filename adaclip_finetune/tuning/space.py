"""What is searched: from `opt_params` to Optuna's distributions, and from a trial's values to the settings of a run."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import ValidationError

from adaclip_finetune.config import Config
from adaclip_finetune.config.base import Contradictions, Settings
from adaclip_finetune.config.layers import nearest, together
from adaclip_finetune.config.optuna import SearchSpace
from adaclip_finetune.config.roles import names_with
from adaclip_finetune.config.schema import schema_of, show
from adaclip_finetune.errors import UserError


class Impossible(Exception):
    """A combination of values that the settings refuse; the message says why, `names` of which settings."""

    def __init__(self, message: str, names: set[str]) -> None:
        super().__init__(message)
        self.names = names


@dataclass(frozen=True)
class Space:
    """Setting (dotted) → the distribution it is drawn from."""

    distributions: Mapping[str, BaseDistribution]

    def grid(self) -> dict[str, list[Any]]:
        """All values of each setting, for GridSampler. Raises UserError where there are endlessly many."""
        return {name: _all_values(name, distribution) for name, distribution in self.distributions.items()}

    def describe(self) -> list[str]:
        """A line for each setting."""
        width = max(map(len, self.distributions))
        return [f"{name:{width}}  {_in_words(distribution)}" for name, distribution in self.distributions.items()]


def search_space(config: Config) -> Space:
    """The space of `config.optuna_cfg`. Raises UserError that lists every setting of it that cannot be searched so."""
    assert config.optuna_cfg is not None
    found: dict[str, BaseDistribution] = {}
    problems: list[str] = []
    for name, space in config.optuna_cfg.opt_params.items():
        try:
            found[name] = _distribution(config, name, space)
        except ValueError as error:
            problems.append(f"optuna_cfg.opt_params.{name}: {error}")
    if config.auto_batch_size and (sizes := [name for name in found if name.endswith("batch_size")]):
        problems.append(f"optuna_cfg.opt_params.{sizes[0]}: auto_batch_size would train with another; give one of them")
    if problems:
        raise UserError(together(problems))
    return Space(found)


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """Draw a value for each setting."""
    return {name: _draw(trial, name, distribution) for name, distribution in space.distributions.items()}


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The same settings with these (dotted names) in place of theirs, to train once. Raises Impossible."""
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
        raise Impossible("; ".join(_reasons(error)), _named(error)) from None


def searchable() -> frozenset[str]:
    """Return the names of the settings that trials may differ in: what is learned depends on them, and they are no
    paths."""
    return names_with("view", "model", "method", "optimisation", paths=False)


def _distribution(config: Config, name: str, space: SearchSpace) -> BaseDistribution:
    """Raises ValueError."""
    kind = _type_of(config, name)
    if space.choices is not None:
        ends = list(space.choices)
        if repeated := [value for value in ends if ends.count(value) > 1]:
            raise ValueError(f"{show(repeated[0])} stands twice among the choices")
    elif kind not in (int, float):
        raise ValueError("is no number, and cannot be searched in a range; give choices")
    else:
        assert space.range is not None
        ends = [_whole(end) if kind is int else end for end in space.range]
    refused = [reason for end in ends if (reason := _refused_alone(config, name, end))]
    if len(refused) == len(ends):
        raise ValueError(f"no trial could be trained: {refused[0]}")
    if space.choices is not None:
        return CategoricalDistribution(space.choices)
    low, high = ends
    if kind is int:
        return IntDistribution(low, high, log=space.log, step=_step(space, low, high, 1))
    return FloatDistribution(low, high, log=space.log, step=_step(space, low, high, None))


def _type_of(config: Config, name: str) -> Any:
    """The type of one setting, null apart. Raises ValueError if there is no such setting, or it is none to search."""
    *above, last = name.split(".")
    section: Any = config
    for step in above:
        section = getattr(section, step, None)
    fields = type(section).model_fields if isinstance(section, Settings) else {}
    if last not in fields:
        known = schema_of(Config)
        names = [path for path, nodes in known.paths().items() if not any(map(known.is_section, nodes))]
        method = f" with peft.method {config.peft.method}" if name.startswith("peft.") else ""
        raise ValueError(f"there is no such setting{method}; the nearest is {nearest(name, names)}")
    kind = _single(fields[last].annotation)
    if (isinstance(kind, type) and issubclass(kind, Settings)) or kind is tuple or last == "method":
        raise ValueError("is no single value; search the settings in it, each by its own name")
    if name.split(".")[0] not in searchable():
        raise ValueError("says where things are, what is measured or how fast it goes, and is the same in all trials")
    return kind


def _single(annotation: Any) -> Any:
    """`int` for `int | None`, `str` for a choice of texts, `tuple` for lists."""
    if get_origin(annotation) is Annotated:
        return _single(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [option for option in get_args(annotation) if option is not type(None)]
        return _single(inner[0])
    if get_origin(annotation) is Literal:
        return str
    return get_origin(annotation) or annotation


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError(f"is a whole number, and {value:g} is none")
    return int(value)


def _step(space: SearchSpace, low: float, high: float, otherwise: int | None) -> Any:
    """Raises ValueError where the step does not lead from end to end: Optuna would move the end."""
    if space.step is None:
        return otherwise
    count = (high - low) / space.step
    if abs(count - round(count)) > 1e-9 * max(count, 1) or count < 1:
        raise ValueError(f"steps of {space.step:g} do not lead from {low:g} to {high:g}")
    return _whole(space.step) if otherwise == 1 else space.step


def _refused_alone(config: Config, name: str, value: Any) -> str:
    """Why the value cannot be with the others as they are, where no other that is searched has a part in it. Raises
    ValueError for a value that the setting itself does not take, whatever the others are."""
    assert config.optuna_cfg is not None
    try:
        with_values(config, {name: value})
    except Impossible as error:
        if not error.names:
            known = schema_of(Config)
            raise ValueError(f"takes {known.words(*known.paths()[name])}, and not {show(value)}") from None
        return "" if error.names & config.optuna_cfg.opt_params.keys() - {name} else str(error)
    return ""


def _named(error: ValidationError) -> set[str]:
    """The settings of combinations that cannot be; none where a value is wrong by itself."""
    raised = [one.get("ctx", {}).get("error") for one in error.errors()]
    return {name for one in raised if isinstance(one, Contradictions) for _, names in one.problems for name in names}


def _reasons(error: ValidationError) -> list[str]:
    found: list[str] = []
    for one in error.errors(include_url=False):
        raised = one.get("ctx", {}).get("error")
        found += [message for message, _ in raised.problems] if isinstance(raised, Contradictions) else [one["msg"]]
    return found


def _draw(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    draw: Any = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return draw(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def _all_values(name: str, distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        count = round((distribution.high - distribution.low) / distribution.step)
        low, high = distribution.low, distribution.high
        return [min(round(low + i * distribution.step, 12), high) for i in range(count + 1)]
    raise UserError(f"optuna_cfg.opt_params.{name}: GridSampler needs a step, without log, or choices")


def _in_words(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return "one of " + ", ".join(show(choice) for choice in distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    log = ", logarithmic" if distribution.log else ""
    step = f", steps of {distribution.step:g}" if distribution.step not in (None, 1) else ""
    return f"{distribution.low:g} to {distribution.high:g}{log}{step}"
