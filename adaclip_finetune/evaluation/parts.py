"""A folder that keeps the finished batches of an evaluation or an index, so that it continues after an interruption.

Each batch is one safetensors file, which is whole or absent; about.json says what the files belong to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save
from torch import Tensor

from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError

ABOUT = "about.json"


class PartFolder:
    """Keeps named batches of tensors in a folder, with JSON values beside them.

    The folder is a cache: if it was made for another `about`, of which about.json holds a digest, the batches in it are
    deleted. Files that are not of this class stay untouched.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """Nothing is read or written until `open`."""
        self.path = path
        self._about = json.dumps({"sha256": hashlib.sha256(json.dumps(about).encode()).hexdigest()}).encode()

    def open(self) -> None:
        """Make the folder, or delete batches in it that belong to something else. Raises UserError."""
        about = self.path / ABOUT
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not about.exists() or about.read_bytes() != self._about:
                about.unlink(missing_ok=True)
                for name in self.names():
                    self._file(name).unlink()
                write_durably(about, self._about)
        except OSError as error:
            raise UserError(f"{self.path}: finished batches cannot be kept here ({error})") from error

    def names(self) -> list[str]:
        """Return the names of all batches."""
        return sorted(path.stem for path in self.path.glob("*.safetensors"))

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and values that were written under this name; None if there are none, or not whole."""
        try:
            with safetensors.safe_open(self._file(name), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
                return tensors, json.loads(file.metadata()["values"])
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
            return None

    def write(self, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Keep tensors and JSON values under this name. Raises UserError if that fails; earlier batches stay."""
        try:
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            write_durably(self._file(name), save(contiguous, {"values": json.dumps(values)}))
        except OSError as error:
            raise UserError(
                f"{self._file(name)}: cannot be written ({error}). Earlier batches are kept: make room, and resume"
            ) from error

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"
