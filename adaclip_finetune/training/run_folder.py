"""The run folder: everything a run leaves behind, and the one place that prints.

output/<dataset>/<timestamp>-<method>/
    config.json  environment.json  train.log  metrics.jsonl  tensorboard/  missing_videos.txt
    best.safetensors  adapter.safetensors  [last.safetensors]  metrics.json  curves.png  frame_usage.png
    while it runs: lock.json  last.json  last-<step>/
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from adaclip_finetune.config import Config
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import FolderLock
from adaclip_finetune.processes import is_main, world_size

_PASSWORD = re.compile(r"(://[^:@/\s]*:)[^@\s]+@")  # in the URL of a database
_EVENTS = "metrics.jsonl"
_MISSING = "missing_videos.txt"
_PACKAGES = (
    "adaclip-finetune",
    "torch",
    "torchvision",
    "open_clip_torch",
    "accelerate",
    "numpy",
    "pillow",
    "av",
    "safetensors",
)


class RunFolder:
    """Prints, logs and writes for one run; in processes other than the main one it is silent and writes nothing.

    `path` is None there, with `no_output`, and until `open`, so that a run which is refused leaves no folder; what is
    said and written until then is kept and follows.
    """

    def __init__(self, config: Config, stream: TextIO | None = None, trial: Path | None = None) -> None:
        """trial: the folder to make for one of many runs, which leaves less behind: nothing for TensorBoard."""
        self.path: Path | None = None
        self._trial = trial
        self.going_on: Path | None = None  # the folder of an earlier run, from `lock` on
        self.events: list[dict[str, Any]] = []
        self._no_output, self._tensorboard_dir = config.no_output, config.tensorboard_dir
        self._stream = stream or sys.stdout
        self._waiting: dict[str, str] | None = {}  # what was written before there was a folder
        self._started = time.monotonic()
        self._writer: SummaryWriter | None = None
        self._lock: FolderLock | None = None

    def open(self, config: Config, device: str) -> None:
        """Make the folder, for a run with these settings on this device (in words): nothing is left to refuse.

        Raises UserError if that cannot be.
        """
        if self._no_output or not is_main():
            self._waiting = None
            return
        self._begin(_new_folder(config) if self._trial is None else _made(self._trial), step=0)
        self.write_json("config.json", config.model_dump(mode="json", exclude=_not_in_force(config)))
        self.write_json("environment.json", environment(device))

    def lock(self, path: Path) -> None:
        """Take hold of an earlier run's folder, before anything is read from it. Raises UserError if another run has
        it, or if it is finished."""
        self.going_on = path
        if is_main():
            self._lock = _locked(path)
        if (path / "metrics.json").exists():
            best = path / "best.safetensors"
            begin = f". To train on from its weights, begin a new run: --resume {best}" if best.exists() else ""
            raise UserError(f"resume: what ran in {path} is finished (metrics.json){begin}")

    def reopen(self, path: Path, step: int, size: int) -> None:
        """Go on in the folder of an earlier run at update `step`, when metrics.jsonl had `size` bytes: what came after
        is forgotten, since it will come again."""
        if not is_main():
            self._waiting = None
            return
        with (path / _EVENTS).open("ab") as file:
            file.truncate(size)
        self.events = [json.loads(line) for line in (path / _EVENTS).read_text(encoding="utf-8").splitlines()]
        if self.events:
            self._started -= self.events[-1]["seconds"]
        (path / _MISSING).unlink(missing_ok=True)  # found again, and noted again
        self._begin(path, step)

    def _begin(self, path: Path, step: int) -> None:
        self.path = path
        self._lock = self._lock or _locked(path)
        if self._trial is None:
            self._writer = SummaryWriter(self._tensorboard_dir or path / "tensorboard", purge_step=step + 1)
        waiting, self._waiting = self._waiting or {}, None
        for name, text in waiting.items():
            self.append_text(name, text)

    def say(self, text: str = "") -> None:
        """Print without tearing a progress bar, and keep the text in train.log."""
        if not is_main():
            return
        self.append_text("train.log", f"{text}\n")
        with suppress(BrokenPipeError):  # `… | tee log`, and tee has gone: no reason to lose what was learned
            tqdm.write(text, file=self._stream)
            self._stream.flush()

    def note_missing(self, reasons: Mapping[str, str]) -> None:
        """Video → reason: all of them go to missing_videos.txt, a line each."""
        self.append_text(_MISSING, "".join(f"{video}\t{reason}\n" for video, reason in reasons.items()))

    def record(self, event: str, step: int, **values: Any) -> None:
        """One line of metrics.jsonl; its numbers go to TensorBoard too. `step` counts updates."""
        line = {"event": event, "step": step, "seconds": round(time.monotonic() - self._started, 3), **values}
        self.events.append(line)
        self.append_text(_EVENTS, json.dumps(line, allow_nan=False) + "\n")
        if self._writer is not None:
            for name, value in _numbers(values):
                self._writer.add_scalar(f"{event}/{name}", value, step)

    def file(self, name: str) -> Path | None:
        """Where a file of this name belongs, or None if nothing is to be written."""
        return None if self.path is None else self.path / name

    def append_text(self, name: str, text: str) -> None:
        if self.path is None:
            if self._waiting is not None:
                self._waiting[name] = self._waiting.get(name, "") + text
            return
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"{self.path / name} could not be written: {error}") from error

    def flushed_events(self) -> int:
        """The size of metrics.jsonl in bytes, when all of it has reached the disk."""
        assert self.path is not None
        with (self.path / _EVENTS).open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def write_json(self, name: str, content: Any) -> None:
        """Written at once or never, for files that stand when the folder is open. Raises UserError."""
        if self.path is None:
            return
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            write_durably(self.path / name, text.encode())
        except OSError as error:
            raise UserError(f"{self.path / name} could not be written: {error}") from error

    def drop(self, name: str) -> None:
        """Delete a folder in it that has served its purpose."""
        if self.path is not None:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def close(self) -> None:
        try:
            if self._writer is not None:
                with suppress(OSError):  # a full disk has been told of by then
                    self._writer.close()
        finally:
            if self._lock is not None:
                self._lock.release()


def environment(device: str) -> dict[str, Any]:
    """What a figure was measured on: versions, machine, command."""
    return {
        "command": [_PASSWORD.sub(r"\1***@", word) for word in sys.argv],
        "processes": world_size(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _not_in_force(config: Config) -> set[str]:
    """A clip_backbone that nobody gave says nothing where weights on disk say what they are."""
    from_disk = config.clip_weights or config.resume
    return {"clip_backbone"} if from_disk and "clip_backbone" not in config.model_fields_set else set()


def _locked(path: Path) -> FolderLock:
    lock = FolderLock(path)
    lock.take()
    return lock


def _made(path: Path) -> Path:
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"output_dir: {path} cannot be made: {error.strerror}") from error
    return path


def _new_folder(config: Config) -> Path:
    parent = Path(config.output_dir) / config.dataset
    try:
        return new_folder(parent, f"{datetime.now():%Y%m%d-%H%M%S}-{config.peft.method}")
    except OSError as error:
        raise UserError(
            f"output_dir: cannot make a run folder in {parent} ({error}); set output_dir or no_output"
        ) from error


def new_folder(parent: Path, name: str) -> Path:
    """A folder of this name, or with a number behind it where others came first. Raises OSError."""
    for attempt in range(1000):
        path = parent / (name if attempt == 0 else f"{name}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise OSError(f"there are a thousand folders {name} already")


def _numbers(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((prefix + name, float(value)))
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
