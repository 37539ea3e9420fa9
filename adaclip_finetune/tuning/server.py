"""A study on a PostgreSQL or MySQL server, for several processes on any machines. Optuna's heartbeats are the signs of
life: a thread of study.optimize gives them for each trial."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy import text
from sqlalchemy.engine import URL

from adaclip_finetune.tuning import signs
from adaclip_finetune.tuning.kept import StudyStorage
from adaclip_finetune.tuning.rdb import open_rdb


@contextmanager
def open_server(url: URL) -> Iterator[ServerStudy]:
    """Raises UserError where the server, or what is on it, cannot be used."""
    stale: list[int] = []
    storage = open_rdb(
        url,
        engine_kwargs={"pool_pre_ping": True},  # servers hang up on those who train for hours
        heartbeat_interval=signs.EVERY_S,
        grace_period=signs.SILENCE_S,
        heartbeat_stale_trial_callback=lambda _, trial: stale.append(trial.number),
    )
    try:
        yield ServerStudy(storage, url, stale)
    finally:
        storage.engine.dispose()


class ServerStudy(StudyStorage):
    """`stale` is where Optuna's callback leaves the numbers of trials that it ended, in study.optimize too."""

    shared = True
    storage: RDBStorage

    def __init__(self, storage: RDBStorage, url: URL, stale: list[int]) -> None:
        super().__init__(storage, url)
        self._stale = stale
        self._silence = signs.Silence()

    def fail_dead(self, study: optuna.Study) -> list[int]:
        """Those whose heartbeats stopped, and those that never had one."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
        stopped = list(self._stale)
        self._stale.clear()
        return stopped + super().fail_dead(study)

    def _died(self, trial: FrozenTrial) -> bool:
        """Killed before the first heartbeat, which Optuna waits for."""
        with self.storage.engine.connect() as connection:
            beats = connection.execute(
                text("SELECT heartbeat FROM trial_heartbeats WHERE trial_id = :trial"), {"trial": trial._trial_id}
            )
            return beats.first() is None and self._silence.too_long(trial._trial_id, None)
