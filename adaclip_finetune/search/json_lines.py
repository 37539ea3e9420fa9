"""Lines of JSON, each parsed when it is asked for: of a hundred thousand, a search looks at ten."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adaclip_finetune.errors import UserError

_NEWLINE = 10


class JsonLines:
    """`content` has a newline behind each line and none inside; `where` is the file's name, for messages."""

    def __init__(self, content: bytes, where: Path) -> None:
        self._content, self._where = content, where
        self._ends = np.flatnonzero(np.frombuffer(content, np.uint8) == _NEWLINE)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Any]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: int) -> Any:
        """Raises UserError for a line that is no JSON."""
        try:
            return json.loads(self._line(place))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self._where}, line {place + 1}: not JSON ({error})") from error

    def digest(self, place: int) -> str:
        """SHA-256 of the line as it is written, which is there much sooner than what it says."""
        return hashlib.sha256(self._line(place)).hexdigest()

    def _line(self, place: int) -> bytes:
        begins = int(self._ends[place - 1]) + 1 if place else 0
        return self._content[begins : int(self._ends[place])]
