"""A study in a journal file, which several processes write together, on one machine or on a folder that machines share.

Who runs a trial says so in the trial's user attribute `lease`: process id, host, when that process began, and the time,
renewed by a thread. On its own machine a process sees at once that another one died; of another machine's it takes
silence for it.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock
from optuna.trial import FrozenTrial

from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import is_alive, this_process
from adaclip_finetune.tuning import signs
from adaclip_finetune.tuning.kept import StudyStorage, check_folder

LEASE = "lease"


def open_journal(name: str) -> JournalStudy:
    """Made where there is none. Raises UserError for what is no journal, or cannot be one."""
    path = Path(name)
    if re.match(r"(sqlite|postgres|mysql)[\w+]*:", name):
        raise UserError(
            "optuna_cfg.storage: a database's URL has :// behind its first word, as in sqlite:///optuna.db; without, "
            "it is the path of a journal file"
        )
    check_folder(path)
    lock = (JournalFileOpenLock if os.name == "nt" else JournalFileSymlinkLock)(name)  # as the dashboard chooses
    try:
        _check(path)
        _cut_off_half_a_line(path, lock)
        return JournalStudy(JournalStorage(JournalFileBackend(name, lock)), name)
    except OSError as error:
        raise UserError(f"optuna_cfg.storage: the journal file {path} cannot be used: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(
            f"optuna_cfg.storage: {path} is no whole journal of Optuna's ({type(error).__name__}: {error}); give "
            "another file"
        ) from None


class JournalStudy(StudyStorage):
    """See above."""

    shared = True
    storage: JournalStorage

    def __init__(self, storage: JournalStorage, path: str) -> None:
        super().__init__(storage, path)
        self._silence = signs.Silence()

    @contextmanager
    def alive(self, trial: optuna.Trial) -> Iterator[None]:
        """Holds the lease of the trial."""
        with super().alive(trial):
            self._sign(trial._trial_id)
            ended = Event()
            renewal = Thread(target=self._renew, args=(trial._trial_id, ended), daemon=True)
            renewal.start()
            try:
                yield
            finally:
                ended.set()
                renewal.join()

    def _renew(self, trial_id: int, ended: Event) -> None:
        while not ended.wait(signs.EVERY_S):
            try:
                self._sign(trial_id)
            except UpdateFinishedTrialError:  # another process has ended it
                return
            except OSError:  # a shared folder may come back
                continue

    def _sign(self, trial_id: int) -> None:
        lease = {**this_process(), "within": _process_ids(), "time": time.time()}
        self.storage.set_trial_user_attr(trial_id, LEASE, lease)

    def _died(self, trial: FrozenTrial) -> bool:
        lease: dict[str, Any] | None = trial.user_attrs.get(LEASE)
        if lease and lease["within"] == _process_ids():
            # One of this very process is left where the end of a trial could not be written.
            return lease["pid"] == os.getpid() or not is_alive(lease)
        return self._silence.too_long(trial._trial_id, lease)


def _check(path: Path) -> None:
    """Before anything is written to it. Raises UserError, OSError, ValueError, KeyError or TypeError."""
    if not path.exists():
        return
    with path.open("rb") as file:
        first_line = file.readline(1 << 20)
    if first_line.startswith(b"SQLite format 3\0"):
        raise UserError(f"optuna_cfg.storage: {path} is an SQLite database; write sqlite:///{path}")
    if first_line:
        json.loads(first_line)["op_code"]


def _cut_off_half_a_line(path: Path, lock: JournalFileOpenLock | JournalFileSymlinkLock) -> None:
    """What a full disk, or a power cut, leaves at the end of the file: the next line would be lost in it."""
    lock.acquire()
    try:
        with path.open("a+b") as file:
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()


def _process_ids() -> dict[str, str]:
    """What process ids can be compared within. Machines may have one name, and so may containers of a machine, which
    number their processes apart."""
    began = str(this_process()["began"])
    try:
        numbering = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        return {"host": socket.gethostname()}
    return {"host": socket.gethostname(), "boot": began.partition("+")[0], "numbering": numbering}
