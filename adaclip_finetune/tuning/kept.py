"""A study where it is kept: what the search asks of any storage beside what Optuna asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from adaclip_finetune.errors import UserError
from adaclip_finetune.tuning.rdb import cannot_be_used, without_password

_BROKEN = (SQLAlchemyError, StorageInternalError)


class StudyStorage(ABC):
    """`storage` is for Optuna; `shared` tells whether several processes may work on one study in it; `shown` is what
    optuna-dashboard is given, but for the password."""

    shared: bool

    def __init__(self, storage: BaseStorage, place: URL | str) -> None:
        self.storage = storage
        self.shown = without_password(place)
        self._place = place
        self._mine: set[int] = set()

    @contextmanager
    def alive(self, trial: optuna.Trial) -> Iterator[None]:
        """Around the work on a trial: others see that this process is at it."""
        self._mine.add(trial._trial_id)
        try:
            yield
        finally:
            self._mine.discard(trial._trial_id)

    def fail_dead(self, study: optuna.Study) -> list[int]:
        """End the trials whose process died, as failed; returns their numbers."""
        dead = [
            trial
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if trial._trial_id not in self._mine and self._died(trial)
        ]
        ended = []
        for trial in dead:
            with suppress(UpdateFinishedTrialError):  # another process saw it too
                self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                ended.append(trial.number)
        return ended

    @contextmanager
    def explained(self, study: optuna.Study) -> Iterator[None]:
        """Around the search: a study or a server that is gone in the middle of it is told as a UserError."""
        name = study.study_name
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # Optuna, which did not expect it, may end in any
            try:
                there = self._is_there(name, study._study_id)
            except (*_BROKEN, OSError) as broken:
                raise cannot_be_used(self._place, broken) from error
            if not there:
                raise UserError(
                    f"optuna_cfg.storage: the study {name} was deleted or renamed while this search ran, and what it "
                    "had found is not here any more; run the command again to begin anew"
                ) from error
            if isinstance(error, _BROKEN):
                raise cannot_be_used(self._place, error) from error
            raise

    @abstractmethod
    def _died(self, trial: FrozenTrial) -> bool:
        """Whether nobody works on a trial any more that is not ended, and that is none of ours."""

    def _is_there(self, name: str, study_id: int) -> bool:
        try:
            return self.storage.get_study_id_from_name(name) == study_id
        except KeyError:
            return False


def check_folder(path: Path) -> None:
    """Raises UserError where a file cannot be, for want of its folder."""
    try:
        if path.absolute().parent.is_dir():
            return
        problem = "is not there; make it"
    except OSError as error:  # one above it is closed to us
        problem = f"cannot be entered ({error.strerror}); choose another"
    raise UserError(f"optuna_cfg.storage: the folder {path.absolute().parent} of {path.name} {problem}")
