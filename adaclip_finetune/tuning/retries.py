"""Points whose process died are tried again, by a trial of their own that waits for the next one who asks."""

from __future__ import annotations

import optuna
from optuna.trial import TrialState

from adaclip_finetune.tuning.ledger import history, lost

# What a sampler, or a user who enqueued the trial, said that the point is to be. All else belongs to the lost try.
_SAID_OF_THE_POINT = ("fixed_params", "grid_id", "search_space")


def requeue_lost(study: optuna.Study) -> list[int]:
    """Enqueue lost points again; returns the numbers of the lost trials. Done by two processes at the same moment, a
    point may wait twice: the later one is then surplus."""
    gone = lost(study.get_trials(deepcopy=False))
    for trial in gone:
        past = [*history(trial), trial.number]
        said = {name: trial.system_attrs[name] for name in _SAID_OF_THE_POINT if name in trial.system_attrs}
        study.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                system_attrs={**said, "failed_trial": past[0], "retry_history": past},  # as Optuna's own retries say it
            )
        )
    return [trial.number for trial in gone]
