"""Which trials count, which are tried again, and which place each has."""

from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from adaclip_finetune.tuning.ledger import counted, is_surplus, lost, may_begin, place


def trials(*kinds: Any) -> list[FrozenTrial]:
    """`done`, `pruned`, `running`, `waiting`, `failed` (for a reason), `died`, `stopped`, `surplus`; ("died", [0]): of
    whom it is the heir."""
    states = {"done": "COMPLETE", "pruned": "PRUNED", "running": "RUNNING", "waiting": "WAITING"}
    attributes = {"failed": {"reason": "memory"}, "stopped": {"interrupted": True}, "surplus": {"surplus": True}}
    found = []
    for number, kind in enumerate(kinds):
        name, history = (kind, []) if isinstance(kind, str) else kind
        state = TrialState[states.get(name, "FAIL")]
        trial = optuna.create_trial(
            state=state,
            value=1.0 if state == TrialState.COMPLETE else None,
            user_attrs=attributes.get(name, {}),
            system_attrs={"retry_history": history} if history else {},
        )
        trial.number = number
        found.append(trial)
    return found


def numbers(found: list[FrozenTrial]) -> list[int]:
    return [trial.number for trial in found]


def test_what_came_to_an_end_counts() -> None:
    study = trials("done", "pruned", "running", "failed", "died", "surplus", ("waiting", [4]))
    assert numbers(counted(study)) == [0, 1, 3]
    assert lost(study) == []


def test_what_came_to_no_end_is_lost_until_it_is_tried_again() -> None:
    assert numbers(lost(trials("done", "died", "stopped", "running"))) == [1, 2]
    assert numbers(lost(trials("done", "died", "stopped", ("running", [1])))) == [2]


def test_a_point_of_which_three_processes_died_is_given_up() -> None:
    study = trials("died", ("died", [0]), ("died", [0, 1]))
    assert (lost(study), numbers(counted(study))) == ([], [2])
    twice = trials("died", ("died", [0]))
    assert (numbers(lost(twice)), counted(twice)) == ([1], [])


def test_being_stopped_is_no_death() -> None:
    study = trials("stopped", ("died", [0]), ("died", [0, 1]))
    assert (numbers(lost(study)), counted(study)) == ([2], [])


def test_a_place_is_kept_for_a_point_that_is_tried_again() -> None:
    uninterrupted = trials("done", "done", "done", "running")
    interrupted = trials("done", "died", ("done", [1]), "done", "running")
    assert place(uninterrupted, 3) == place(interrupted, 4) == 3
    # Lost, but nobody has it yet: the place is taken all the same.
    assert place(trials("done", "died", "running"), 2) == 2


def test_no_two_trials_at_work_have_one_place() -> None:
    study = trials("done", "running", "running", "died", ("running", [3]), ("running", [3]), "running")
    places = [place(study, trial.number) for trial in study if trial.state == TrialState.RUNNING and trial.number != 5]
    assert len(set(places)) == len(places)
    assert place(study, 6) == 4


def test_a_second_heir_that_dies_before_it_is_told_leaves_no_heir() -> None:
    assert lost(trials("died", ("done", [0]), ("died", [0]))) == []


def test_an_heir_has_the_place_of_the_first_that_tried() -> None:
    study = trials("done", "done", "died", "running", "running", ("running", [2]))
    assert [place(study, number) for number in range(6)] == [0, 1, 2, 3, 4, 2]


def test_a_surplus_trial_that_died_takes_no_place_for_ever() -> None:
    study = trials("done", "died", ("surplus", [1]), "running")
    assert (lost(study), place(study, 3)) == ([], 1)
    assert is_surplus(trials("done", "died", ("surplus", [1]), ("running", [1])), 3, 9)


def test_surplus_is_what_is_beyond_the_number_wanted_and_a_second_heir() -> None:
    study = trials("done", "died", ("running", [1]), ("running", [1]), "running")
    assert [is_surplus(study, number, 3) for number in (2, 3, 4)] == [False, True, False]
    assert [is_surplus(study, number, 2) for number in (2, 3, 4)] == [False, True, True]


def test_one_more_may_begin_while_points_are_left_or_wait() -> None:
    assert may_begin(trials("done", "running"), 3)
    assert not may_begin(trials("done", "running"), 2)
    assert not may_begin(trials("done", "died"), 2), "the lost point is to be enqueued first"
    assert may_begin(trials("done", "died", ("waiting", [1])), 2)
    assert may_begin(trials("done", "surplus", "running"), 3)
