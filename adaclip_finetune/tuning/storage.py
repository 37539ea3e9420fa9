"""Where a study is kept, by its URL: an SQLite file for one process; a journal file or a server for several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adaclip_finetune.tuning.journal import open_journal
from adaclip_finetune.tuning.kept import StudyStorage
from adaclip_finetune.tuning.rdb import parse_url
from adaclip_finetune.tuning.server import open_server
from adaclip_finetune.tuning.sqlite import open_sqlite

__all__ = ["StudyStorage", "open_storage"]


@contextmanager
def open_storage(url: str) -> Iterator[StudyStorage]:
    """`url` is `sqlite:///FILE`, any other database URL of SQLAlchemy's, or, without `://`, the path of a journal file;
    optuna-dashboard takes the same. Raises UserError for what cannot be used."""
    if "://" not in url:
        yield open_journal(url)
        return
    parsed = parse_url(url)
    with (open_sqlite if parsed.get_backend_name() == "sqlite" else open_server)(parsed) as storage:
        yield storage
