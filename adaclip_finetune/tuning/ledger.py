"""The account of a study's trials: which of them count, which are to be tried again, and which place each has.

A trial that came to its end says why it failed or was pruned in the user attribute `reason`. One that failed without a
reason was stopped (`interrupted`), or its process died: its point is tried again by another trial, whose system
attribute `retry_history` (Optuna's name) tells of whom it is the heir. One more than was wanted is `surplus`.
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
    """Those that came to an end: completed, pruned, failed for a reason, or given up."""
    return [trial for trial in trials if _has_ended(trial) or _is_given_up(trial, trials)]


def lost(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that came to no end, whose point nobody tries again yet."""
    tried_again = {number for trial in trials for number in history(trial)}
    return [
        trial
        for trial in trials
        if _was_cut_off(trial) and trial.number not in tried_again and not _is_given_up(trial, trials)
    ]


def place(trials: Sequence[FrozenTrial], number: int) -> int:
    """How many points of the study come before trial `number`. A point that is tried again comes once, with the trial
    that does so last: a study that was interrupted goes on as it would have gone on."""
    earlier = [trial for trial in trials if trial.number < number and "surplus" not in trial.user_attrs]
    tried_again = {again for trial in trials if trial.number <= number for again in history(trial)}
    return sum(trial.number not in tried_again and not _is_second_heir(trial, trials) for trial in earlier)


def may_begin(trials: Sequence[FrozenTrial], wanted: int) -> bool:
    """Whether there is a point left to take. Without one, others are at work on the rest."""
    return any(trial.state == TrialState.WAITING for trial in trials) or place(trials, len(trials)) < wanted


def is_surplus(trials: Sequence[FrozenTrial], number: int, wanted: int) -> bool:
    """Whether trial `number` is one too many: two workers took the last place, or tried one lost point again."""
    mine = next(trial for trial in trials if trial.number == number)
    return place(trials, number) >= wanted or _is_second_heir(mine, trials)


def _has_ended(trial: FrozenTrial) -> bool:
    if "surplus" in trial.user_attrs:
        return False
    failed = trial.state == TrialState.FAIL
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (failed and "reason" in trial.user_attrs)


def _was_cut_off(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and not {"reason", "surplus"} & trial.user_attrs.keys()


def _is_given_up(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    if not _was_cut_off(trial) or len(history(trial)) < DEATHS - 1:
        return False
    stopped = {other.number for other in trials if "interrupted" in other.user_attrs}
    return len({*history(trial), trial.number} - stopped) >= DEATHS


def _is_second_heir(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    """Whether an earlier trial already tries the same point again: two workers found it lost at once."""
    again = history(trial)
    return bool(again) and any(other.number < trial.number and history(other) == again for other in trials)
