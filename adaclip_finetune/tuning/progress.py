"""What is said of a search in the terminal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from adaclip_finetune.config import Config
from adaclip_finetune.evaluation.tasks.base import value
from adaclip_finetune.training.outcome import SELECTED_ON_TEST
from adaclip_finetune.training.trainer import chosen_on_test
from adaclip_finetune.tuning.folder import BEST_CONFIG, StudyFolder, best_trial, short
from adaclip_finetune.tuning.ledger import counted


class Progress:
    """How trials end, and when all of them will have."""

    def __init__(self, wanted: int) -> None:
        self._wanted, self._began, self._ended = wanted, time.monotonic(), 0

    def line(self, study: optuna.Study, trial: FrozenTrial) -> str:
        """One trial's end, the best so far, and the time that is left."""
        self._ended += 1
        trials, best = study.get_trials(deepcopy=False), best_trial(study)
        parts = [f"  {_outcome(trial, best)}"]
        if best is not None and best.number != trial.number:
            parts.append(f"best so far {best.value:.1f} (trial {best.number})")
        if left := max(0, self._wanted - len(counted(trials))):
            workers = 1 + sum(other.state == TrialState.RUNNING for other in trials)
            seconds = (time.monotonic() - self._began) / self._ended * left / workers
            parts.append(f"{left} to go, about {_duration(seconds)}")
        return "   ".join(parts)


def summary(config: Config, study: optuna.Study, folder: StudyFolder) -> Iterator[str]:
    """What the whole search found, in lines."""
    trials = counted(study.get_trials(deepcopy=False))
    states = Counter(trial.state for trial in trials)
    yield (
        f"{len(trials)} trials: {states[TrialState.COMPLETE]} completed, {states[TrialState.PRUNED]} pruned, "
        f"{states[TrialState.FAIL]} failed"
    )
    best = best_trial(study)
    if best is None:
        yield "no trial completed, so there is no best one"
        return
    assert config.optuna_cfg is not None
    objective = config.searched_figure
    before = _zero_shot_value(study, objective)
    on = SELECTED_ON_TEST if chosen_on_test(config) else "on validation"
    yield f"best: trial {best.number}, {objective} {best.value:.1f} {on}" + (
        "" if before is None else f" (zero-shot {before:.1f}){without(study.user_attrs['zero_shot'])}"
    )
    width = max(map(len, best.params))
    yield from (f"  {name:{width}}  {short(value)}" for name, value in best.params.items())
    if before is not None and not _beats(study, best, before):
        yield "No trial beats zero-shot: widen the ranges, or give more epochs or more data."
    if folder.path is not None:
        yield (
            f"study: {folder.path} (study.csv, {BEST_CONFIG}, pictures)\n"
            f"next: python train.py --config {folder.path / BEST_CONFIG}"
        )


def without(found: Mapping[str, Any]) -> str:
    """What is to stand beside figures of a gallery that is not whole (skip_missing)."""
    of = next((part for part in found.values() if isinstance(part, Mapping) and "videos_listed" in part), None)
    missing = 0 if of is None else of["videos_listed"] - of["videos_evaluated"]
    return f", WITHOUT {missing} of {of['videos_listed']} videos" if of is not None and missing else ""


def _outcome(trial: FrozenTrial, best: FrozenTrial | None) -> str:
    if trial.state == TrialState.COMPLETE:
        mark = "  ← best so far" if best is not None and best.number == trial.number else ""
        facts: dict[str, Any] = trial.user_attrs
        return f"{trial.value:.1f} at epoch {facts['best_epoch']}, {facts['seconds']:g} s{mark}"
    reason = str(trial.user_attrs.get("reason", "")).partition("\n")[0]
    return reason if trial.state == TrialState.PRUNED else f"failed: {reason}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _zero_shot_value(study: optuna.Study, objective: str) -> float | None:
    found = study.user_attrs.get("zero_shot")
    if not found:
        return None
    return value(found, objective)


def _beats(study: optuna.Study, best: FrozenTrial, before: float) -> bool:
    assert best.value is not None
    maximize = study.direction == optuna.study.StudyDirection.MAXIMIZE
    return best.value > before if maximize else best.value < before
