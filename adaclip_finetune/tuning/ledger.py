"""The account of a study's points: which of them count, which are to be tried again, and which place each has.

A point is a trial together with the trials that try it again, whose system attribute `retry_history` (Optuna's name)
tells of whom they are the heirs. A trial that came to its end says why it failed or was pruned in the user attribute
`reason`. One that failed without a reason was stopped (`interrupted`), or its process died. One more than was wanted is
`surplus`.
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

DEATHS = 3
"""So many processes may die of one point before it is given up."""


def history(trial: FrozenTrial) -> list[int]:
    """The trials whose point this one tries again, the oldest first."""
    return list(trial.system_attrs.get("retry_history", []))


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials with which a point came to an end: completed, pruned, failed for a reason, or given up."""
    return [trial for trial in _points(trials).values() if trial.state.is_finished() and not _is_lost(trial, trials)]


def lost(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that came to no end, and whose point nobody tries again yet."""
    return [trial for trial in _points(trials).values() if _is_lost(trial, trials)]


def place(trials: Sequence[FrozenTrial], number: int) -> int:
    """How many points of the study come before that of trial `number`, which may be one to come. Of no two points is it
    the same, and an heir has the place of the first that tried: a study that was interrupted goes on as it would have
    gone on."""
    first = next((_first(trial) for trial in trials if trial.number == number), number)
    return sum(other < first for other in _points(trials))


def may_begin(trials: Sequence[FrozenTrial], wanted: int) -> bool:
    """Whether there is a point left to take. Without one, others are at work on the rest."""
    return any(trial.state == TrialState.WAITING for trial in trials) or len(_points(trials)) < wanted


def is_surplus(trials: Sequence[FrozenTrial], number: int, wanted: int) -> bool:
    """Whether trial `number` is one too many: two workers took the last place, or tried one lost point again."""
    mine = next(trial for trial in trials if trial.number == number)
    tries = _points(trials).get(_first(mine))
    return tries is None or tries.number != number or place(trials, number) >= wanted


def given_up(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    """Whether its point is not tried again, though it came to no end of its own."""
    failed = trial.state == TrialState.FAIL and not {"reason", "surplus"} & trial.user_attrs.keys()
    return failed and not _is_lost(trial, trials)


def _points(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Of every point the trial that tried it last, by the number of the one that did first. A point that was given up
    as surplus is none, whoever began it."""
    last: dict[int, FrozenTrial] = {}
    heirs: set[tuple[int, ...]] = set()
    for trial in sorted(trials, key=lambda trial: trial.number):
        again = tuple(history(trial))
        if again and again in heirs:  # two workers found it lost at once: the earlier one has it
            continue
        heirs.add(again)
        last[_first(trial)] = trial
    return {first: trial for first, trial in last.items() if "surplus" not in trial.user_attrs}


def _first(trial: FrozenTrial) -> int:
    return next(iter(history(trial)), trial.number)


def _is_lost(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    if trial.state != TrialState.FAIL or "reason" in trial.user_attrs:
        return False
    stopped = {other.number for other in trials if "interrupted" in other.user_attrs}
    return len({*history(trial), trial.number} - stopped) < DEATHS
