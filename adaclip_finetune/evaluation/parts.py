"""What a batch of an evaluation became, and the folder that keeps it, so that an evaluation which was killed goes on.

One safetensors file a batch, written beside its place, flushed and renamed: it is whole, or it is not there. about.json
says what the files belong to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save
from torch import Tensor

from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json

_ABOUT = "about.json"


@dataclass(frozen=True)
class Part:
    """A batch, embedded, on the CPU."""

    places: Tensor  # int64 (n,), which items of the whole the rows are
    rows: Tensor  # float32 (n, …)
    usage: Tensor  # int64 (N,), how often each candidate frame was chosen; (0,) where none is chosen
    failed: dict[str, str] = field(default_factory=dict)  # unreadable video → reason


class PartFolder:
    """The finished batches of one evaluation.

    A folder whose about.json says something else is begun anew rather than refused: it is a cache inside a run folder,
    and a run that went back a few updates and came to other weights must not be stopped by what it kept. What is not
    this class's own stays untouched.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], keep_failures: bool) -> None:
        """Nothing happens until `open`. Without `keep_failures` a batch with unreadable videos is not kept: they are to
        be mended, and then read."""
        self.path, self._about, self._keep_failures = path, dict(about), keep_failures

    def open(self) -> None:
        """Raises UserError."""
        about = self.path / _ABOUT
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not about.exists() or _read(about) != self._about:
                about.unlink(missing_ok=True)
                for part in self.path.glob("*.safetensors"):
                    part.unlink()
                write_durably(about, json.dumps(self._about, indent=1).encode())
        except OSError as error:
            raise UserError(f"{self.path}: embeddings cannot be kept here ({error})") from error

    def read(self, name: str) -> Part | None:
        """What was kept under the name; None if nothing was, or not all of it reached the disk."""
        path = self.path / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
                failed = json.loads(file.metadata()["failed"])
            return Part(**tensors, failed=failed)
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
            return None

    def write(self, name: str, part: Part) -> None:
        """Raises UserError where that fails, the disk being full, say: then the batches before it stay."""
        if part.failed and not self._keep_failures:
            return
        tensors = {"places": part.places, "rows": part.rows.contiguous(), "usage": part.usage}
        path = self.path / f"{name}.safetensors"
        try:
            write_durably(path, save(tensors, {"failed": json.dumps(part.failed)}))
        except OSError as error:
            raise UserError(
                f"{path}: could not be written ({error}). The batches before it are kept: make room, and go on"
            ) from error


def names_digest(names: list[str]) -> str:
    """SHA-256 of names in their order."""
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _read(about: Path) -> Any:
    try:
        return read_json(about)
    except UserError:  # not all of it reached the disk
        return None
