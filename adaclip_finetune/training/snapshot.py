"""Where a run can go on from: `last-<step>/` in the run folder, and `last.json`, which points to the newest whole one.

A snapshot is written beside its place, flushed, renamed, and only then pointed to; the one before it is deleted last. A
crash at any moment leaves one that is whole. It is data: tensors in safetensors, the rest in JSON, nothing pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from adaclip_finetune.durable import flush_folder, write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.checkpoint import save_tensors

_POINTER = "last.json"
_TENSORS = "state.safetensors"
_VALUES = "state.json"


@dataclass(frozen=True)
class Snapshot:
    """All that decides how a run goes on. Tensors by name, grouped by prefix (`model/…`); values that JSON can hold."""

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors of one group, without its prefix."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}


def save_snapshot(folder: Path, snapshot: Snapshot, results: Iterable[str]) -> None:
    """Save into the run folder. `results` (files there, such as best.safetensors) are kept as they are now, too.

    Raises UserError where that fails, the disk being full, say: then the snapshot before this one is untouched.
    """
    name = f"last-{snapshot.step}"
    part = folder / f".{name}.part"
    try:
        _clear(part)
        part.mkdir()
        save_tensors(part / _TENSORS, snapshot.tensors, {"content": "snapshot"})
        write_durably(part / _VALUES, json.dumps({"step": snapshot.step, **snapshot.values}, allow_nan=False).encode())
        for result in results:
            if (folder / result).exists():
                _same_file(folder / result, part / result)
        flush_folder(part)
        _clear(folder / name)  # left by a run that died before it pointed there
        part.rename(folder / name)
        flush_folder(folder)
        write_durably(folder / _POINTER, json.dumps({"snapshot": name}).encode())
    except (OSError, UserError) as error:
        _clear(part)
        raise UserError(
            f"update {snapshot.step} could not be saved: {error}\n{_good_one(folder)}. Make room, and go on from there"
        ) from error
    for path in folder.glob("last-*"):
        if path.name != name:
            shutil.rmtree(path, ignore_errors=True)  # what is left of it is deleted next time


def load_snapshot(folder: Path) -> Snapshot | None:
    """The newest whole snapshot of the run folder, None if nothing was saved yet. UserError if it is broken."""
    pointer = folder / _POINTER
    if not pointer.exists():
        return None
    try:
        path = folder / json.loads(pointer.read_text(encoding="utf-8"))["snapshot"]
        values = json.loads((path / _VALUES).read_text(encoding="utf-8"))
        with safetensors.safe_open(path / _TENSORS, framework="pt") as file:
            # Copies: a mapped file could not be deleted everywhere when the next snapshot takes its place.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"resume: what {pointer} points to cannot be read ({error})") from error
    return Snapshot(values.pop("step"), tensors, values)


def restore_results(folder: Path, snapshot: Snapshot, results: Iterable[str]) -> None:
    """Make the results in the run folder what they were when the snapshot was saved."""
    for name in results:
        kept, beside = folder / f"last-{snapshot.step}" / name, folder / f".{name}.part"
        beside.unlink(missing_ok=True)
        if kept.exists():
            _same_file(kept, beside)
            beside.replace(folder / name)
            beside.unlink(missing_ok=True)  # renaming one name of a file to another of its names does nothing
        else:
            (folder / name).unlink(missing_ok=True)


def drop_snapshots(folder: Path) -> None:
    """A finished run needs none."""
    (folder / _POINTER).unlink(missing_ok=True)
    for path in [*folder.glob("last-*"), *folder.glob(".last-*.part")]:
        shutil.rmtree(path, ignore_errors=True)


def _good_one(folder: Path) -> str:
    try:
        name = json.loads((folder / _POINTER).read_text(encoding="utf-8"))["snapshot"]
    except (OSError, ValueError, KeyError):
        return "Nothing was saved before it"
    return f"What was saved before it is whole: {folder / name} (--resume {folder})"


def _same_file(source: Path, target: Path) -> None:
    """A second name for the file as it is now: whoever replaces the first leaves this one."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
