"""How the next point is chosen, and which trials are ended early: Optuna's samplers and pruners, by name."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, PercentilePruner
from optuna.samplers import BaseSampler, GridSampler
from optuna.trial import FrozenTrial, TrialState

from adaclip_finetune.config import Config
from adaclip_finetune.config.layers import nearest
from adaclip_finetune.config.optuna import OptunaSettings
from adaclip_finetune.config.schema import show
from adaclip_finetune.errors import UserError
from adaclip_finetune.tuning.ledger import place
from adaclip_finetune.tuning.space import Space, suggest

_KEPT_BY_PERCENTILE = 25.0
_RANDOM_POINTS = 12  # more than any sampler asks for by default before it begins its own way
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "an object"}


def make_sampler(config: Config, space: Space) -> BaseSampler:
    """The sampler that `optuna_cfg.sampler` names. Raises UserError for arguments that its class does not take."""
    assert config.optuna_cfg is not None
    settings = config.optuna_cfg.sampler
    arguments = dict(settings.model_extra or {})
    if settings.name == "GridSampler":
        _check_arguments(GridSampler, arguments)
        return GridByPlace(space.grid(), seed=_seed(config, arguments))
    kind: Any = getattr(optuna.samplers, settings.name)
    _check_arguments(kind, arguments)
    seed = _seed(config, arguments)
    arguments.pop("seed", None)

    def make(seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler: BaseSampler = kind(**arguments, seed=seed)
        return sampler

    try:
        return SeededByPlace(make, seed)
    except (TypeError, ValueError) as error:
        raise _refuses(settings.name, arguments, error) from None


def check_sampler(config: Config, space: Space) -> BaseSampler:
    """The same, when it has drawn points. Raises UserError for arguments that only then are seen to be wrong."""
    assert config.optuna_cfg is not None
    settings, sampler = config.optuna_cfg.sampler, make_sampler(config, space)
    if isinstance(sampler, SeededByPlace):
        try:
            _rehearse(sampler, space)
        except Exception as error:  # samplers raise whatever they stumble over, some of them trials later
            raise _refuses(settings.name, settings.model_extra, error) from None
    return sampler


def make_pruner(settings: OptunaSettings, num_epochs: int) -> BasePruner:
    """The pruner that `optuna_cfg.pruner` names; steps are epochs, from 1."""
    first = settings.n_warmup_steps + 1  # after which a trial may be pruned
    if settings.pruner == "median":
        return MedianPruner(n_warmup_steps=first)
    if settings.pruner == "percentile":
        return PercentilePruner(_KEPT_BY_PERCENTILE, n_warmup_steps=first)
    if settings.pruner == "hyperband":
        return HyperbandPruner(min_resource=first, max_resource=max(first, num_epochs))
    return NopPruner()


class GridByPlace(GridSampler):
    """Each point of the grid once, in an order that follows from the seed: that of the trial's place in the study.

    Optuna's own chooses at random once it has come round, so that two workers may choose the same point.
    """

    @property
    def size(self) -> int:
        """Points of the grid."""
        return len(self._all_grids)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if "grid_id" not in trial.system_attrs:  # else a point that is tried again
            here = _place(study, trial) % self.size
            study._storage.set_trial_system_attr(trial._trial_id, "search_space", self._search_space)
            study._storage.set_trial_system_attr(trial._trial_id, "grid_id", here)


class SeededByPlace(BaseSampler):
    """A sampler that is made anew for each trial, seeded by the trial's place in the study.

    So what it draws follows from the seed and from what the study has found: the same in one go or in several, and
    never the same twice by several workers, of which no two have a trial of the same place.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._sampler = make(0)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        here = _place(study, trial)
        self._sampler = self._make(int(np.random.SeedSequence((self._seed, here)).generate_state(1)[0]))
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._sampler.after_trial(study, trial, state, values)


def _place(study: optuna.Study, trial: FrozenTrial) -> int:
    """In the whole study: a pruner may show a sampler a part of it only, as Hyperband does."""
    return place(study._storage.get_all_trials(study._study_id, deepcopy=False), trial.number)


def _seed(config: Config, arguments: Mapping[str, Any]) -> int:
    """The sampler's own, or that of the config."""
    seed = arguments.get("seed")
    if seed is None:
        return config.seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserError(f"optuna_cfg.sampler.seed is {show(seed)}, but must be a whole number from 0 to 2^32 - 1")
    return seed


def _refuses(name: str, arguments: Mapping[str, Any] | None, error: Exception) -> UserError:
    return UserError(f"optuna_cfg.sampler: {name} refuses {show(arguments)}: {error}")


def _rehearse(sampler: BaseSampler, space: Space) -> None:
    """Ask for points, the first and those after random ones are known."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    study.optimize(lambda trial: len(suggest(trial, space)) + trial.number, n_trials=_RANDOM_POINTS)
    for known in ([], study.trials):
        rehearsal = optuna.create_study(sampler=sampler)
        rehearsal.add_trials(known)
        rehearsal.optimize(lambda trial: float(len(suggest(trial, space))), n_trials=2)


def _check_arguments(kind: Any, arguments: Mapping[str, Any]) -> None:
    """Raises UserError for an argument that the class does not know, or that JSON cannot spell."""
    known = {
        name: types
        for name, parameter in inspect.signature(kind).parameters.items()
        if (types := _spelled_in_json(str(parameter.annotation)))
    }
    for name, value in arguments.items():
        if name not in known:
            raise UserError(
                f"optuna_cfg.sampler: {kind.__name__} takes no {name} here; the nearest is {nearest(name, known)} "
                f"(of {', '.join(known)})"
            )
        if type(value) not in known[name]:
            allowed = " or ".join(_NAMES.get(one, "null") for one in known[name])
            raise UserError(f"optuna_cfg.sampler.{name} is {show(value)}, but must be {allowed}")


def _spelled_in_json(annotation: str) -> list[type]:
    """The types of JSON that an annotation such as `int | None` allows; none if it asks for other things too."""
    words = annotation.replace("dict[str, Any]", "dict").replace("|", " ").split()
    types: dict[str, list[type]] = {"bool": [bool], "int": [int], "float": [float, int], "str": [str], "dict": [dict]}
    types["None"] = [type(None)]
    return [one for word in words for one in types[word]] if set(words) <= types.keys() else []
