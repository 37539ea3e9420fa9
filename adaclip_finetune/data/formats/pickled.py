"""A pickle of plain containers and text, read without running anything that is in it.

Unpickling calls whatever the file names; here it may name nothing. Lists, dicts, tuples, text and numbers need no name.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

from adaclip_finetune.errors import UserError


def read_plain_pickle(path: Path) -> Any:
    """What the file holds. Raises UserError, also for a pickle that needs code to be read."""
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="utf-8").load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle fails in whatever way its bytes lead to
        raise UserError(
            f"{path}: expected a pickle of plain lists, dicts and text ({error}); nothing was run"
        ) from None


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside the file")
