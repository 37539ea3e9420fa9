"""Weights files, and the snapshots from which a run can be resumed.

A snapshot is the folder `last-<step>/` in the run folder. It is written under another name, flushed to disk and then
renamed, and older ones are deleted last, so the newest is whole after a crash at any moment. Tensors are safetensors
and everything else is JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaclip_finetune.durable import flush_folder, replacing, write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.weights.checkpoints import FORMAT

BEST = "best.safetensors"
ADAPTER = "adapter.safetensors"
_RESULTS = (BEST, ADAPTER)
_TENSORS = "state.safetensors"
_VALUES = "state.json"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a safetensors file, whole or not at all. Raise UserError if that fails."""
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as part:
            save_file(state, part, metadata={"format": FORMAT, **metadata})
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} could not be written ({error}); what was there before is unchanged") from error


@dataclass(frozen=True)
class Snapshot:
    """Everything that decides how a run continues after update `step`.

    `tensors` are grouped by prefix (`model/…`, `optimizer/…`); `values` are what JSON can hold.
    """

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]

    def group(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one group, without the prefix in their names."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}


def save_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Save a snapshot in a run folder, with the best weights as they are now, and delete the older ones.

    Raise UserError if that fails, for example on a full disk; the older snapshot is then unchanged.
    """
    path = folder / f"last-{snapshot.step}"
    part = folder / f".{path.name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        save_tensors(part / _TENSORS, snapshot.tensors, {"content": "snapshot"})
        write_durably(part / _VALUES, json.dumps({"step": snapshot.step, **snapshot.values}, allow_nan=False).encode())
        for name in _RESULTS:
            if (folder / name).exists():
                _link(folder / name, part / name)
        flush_folder(part)
        part.rename(path)
        flush_folder(folder)
    except (OSError, UserError) as error:
        shutil.rmtree(part, ignore_errors=True)
        older = _snapshots(folder)
        safe = f"{older[-1]} is whole. Free some space and resume: --resume {folder}" if older else "Nothing was saved"
        raise UserError(f"update {snapshot.step} could not be saved: {error}\n{safe}") from error
    for other in _snapshots(folder):
        if other != path:
            shutil.rmtree(other, ignore_errors=True)


def load_snapshot(folder: Path) -> Snapshot | None:
    """Return the newest snapshot of a run folder, None for a run that ended before it saved one.

    Raise UserError if the newest snapshot cannot be read, or is missing although the run had saved one: what is left of
    a run must not be overwritten by one that did not read it.
    """
    found = _snapshots(folder)
    if not found:
        if any(folder.glob("*.safetensors")):
            raise UserError(
                f"resume: {folder} holds weights but no snapshot (a folder last-<update>), so the run cannot continue. "
                f"Restore the snapshot, or begin a new run with the weights: --resume {folder / BEST}"
            )
        return None
    path = found[-1]
    try:
        values = json.loads((path / _VALUES).read_text(encoding="utf-8"))
        return Snapshot(values.pop("step"), load_file(path / _TENSORS), values)
    except (OSError, ValueError, KeyError, AttributeError, safetensors.SafetensorError) as error:
        raise UserError(f"resume: the snapshot {path} cannot be read ({error}). Restore it, or begin anew") from error


def restore_results(folder: Path, snapshot: Snapshot) -> None:
    """Set the best weights in the run folder back to what they were when the snapshot was saved."""
    for name in _RESULTS:
        (folder / name).unlink(missing_ok=True)
        if (kept := folder / f"last-{snapshot.step}" / name).exists():
            _link(kept, folder / name)


def _snapshots(folder: Path) -> list[Path]:
    """Return the snapshot folders, the newest last."""
    numbered = [(path.name.removeprefix("last-"), path) for path in folder.glob("last-*")]
    return [path for _, path in sorted((int(step), path) for step, path in numbered if step.isdecimal())]


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, so that replacing the first leaves it as it is now."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
