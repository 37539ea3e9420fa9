"""A study in an SQLite file: for one process at a time, and guarded while it is written.

optuna-dashboard may read while a search runs. Its buttons could also delete the study, or tell a trial's end before the
trial does. So triggers stand before every write but those of notes: they call an SQL function that only the connections
of the running search have, and fail on all others. What a killed process leaves of them, the next one takes away.

The file keeps SQLite's rollback journal. With the write-ahead log, a reader that stays in its transaction could not
hold a write up; but it does not work on network file systems, and a copy of the one file would miss what is in the
other.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial
from sqlalchemy.engine import URL

from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import Lock
from adaclip_finetune.tuning.kept import StudyStorage, check_folder
from adaclip_finetune.tuning.rdb import open_rdb

# How long a write waits for readers; the dashboard's take milliseconds.
PATIENCE_S = 600.0

# The others' error message is "no such function: " and this.
_KEY = "only_the_running_search_may_write_here"
_NOTES = "study_system_attributes"


@contextmanager
def open_sqlite(url: URL) -> Iterator[SQLiteStudy]:
    """Ours alone until the end. Raises UserError where it cannot be."""
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise UserError("optuna_cfg.storage: give the path of a file behind sqlite:///, as in sqlite:///optuna.db")
    path = Path(url.database).resolve()
    check_folder(path)
    with _alone(path), _connected(path) as connection:
        options = {"timeout": PATIENCE_S, "factory": _WithKey}
        storage = open_rdb(url, engine_kwargs={"connect_args": options})
        try:
            _guard(connection)
            yield SQLiteStudy(storage, url)
        finally:
            storage.engine.dispose()
            with suppress(sqlite3.Error):  # a full disk: the next one does it
                _take_guard_away(connection)


class SQLiteStudy(StudyStorage):
    """Nobody else may work on it, so what seems to run, and is not ours, is dead."""

    shared = False

    def _died(self, trial: FrozenTrial) -> bool:
        return True


class _WithKey(sqlite3.Connection):
    """A connection that the guard lets through."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("PRAGMA trusted_schema = ON")  # some builds let triggers call built-in functions only
        self.create_function(_KEY, 0, lambda: None)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    lock = Lock(path.with_name(f".{path.name}.lock"), path)
    try:
        lock.take()
    except UserError as held:
        raise UserError(
            f"optuna_cfg.storage: {held}.\n"
            "SQLite locks the whole file for each write, and Optuna is not made for several processes on one. To "
            "spread a search over processes, give each of them the same journal file (--optuna_cfg.storage "
            "optuna.journal) or the same server (--optuna_cfg.storage postgresql://USER:PASSWORD@HOST/DATABASE, or "
            "mysql+pymysql://…)"
        ) from None
    except OSError as error:
        raise UserError(
            f"optuna_cfg.storage: nothing can be written beside {path} ({error.strerror}); choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to what is a database that we can write, or to nothing yet."""
    try:
        with closing(sqlite3.connect(path, timeout=PATIENCE_S, isolation_level=None, factory=_WithKey)) as connection:
            _take_guard_away(connection)
            tables = _names(connection, "table")
            if tables and "version_info" not in tables:
                raise UserError(
                    f"optuna_cfg.storage: {path} is a database of another program (with a table {tables[0]}); choose "
                    "another file"
                )
            yield connection
    except sqlite3.Error as error:
        advice = "; if it is a journal file, give its path without sqlite:///" if "not a database" in str(error) else ""
        raise UserError(f"optuna_cfg.storage: {path} cannot be used: {error}{advice}") from None


def _guard(connection: sqlite3.Connection) -> None:
    with _whole(connection):
        for table in _names(connection, "table"):
            if not table.startswith(("studies", "study_", "trial")):  # Optuna's own; others are not ours to guard
                continue
            for operation in ("DELETE",) if table == _NOTES else ("INSERT", "UPDATE", "DELETE"):
                connection.execute(
                    f"CREATE TRIGGER {_KEY}_{table}_{operation} BEFORE {operation} ON {table} "
                    f"BEGIN SELECT {_KEY}(); END"
                )


def _take_guard_away(connection: sqlite3.Connection) -> None:
    with _whole(connection):
        for trigger in _names(connection, "trigger"):
            if trigger.startswith(_KEY):
                connection.execute(f"DROP TRIGGER {trigger}")


@contextmanager
def _whole(connection: sqlite3.Connection) -> Iterator[None]:
    """All of it or nothing. Raises sqlite3.Error where the file cannot be written."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _names(connection: sqlite3.Connection, kind: str) -> list[str]:
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type = ? ORDER BY name", (kind,))
    return [name for (name,) in rows.fetchall()]
