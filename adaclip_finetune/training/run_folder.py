"""The run folder: everything that a run leaves behind, and the only place that prints during a run.

output/<dataset>/<time>-<method>/
    config.json  environment.json  train.log  metrics.jsonl  tensorboard/  [trackers.json]  missing_videos.txt
    best.safetensors  adapter.safetensors  [last.safetensors]  metrics.json  curves.png  frame_usage.png
    [confusion.png]
    while it runs: lock.json  last-<step>/
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from adaclip_finetune import __version__
from adaclip_finetune.config import Config
from adaclip_finetune.data.readable import listing
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import FolderLock
from adaclip_finetune.processes import is_main, world_size
from adaclip_finetune.training.signals import Interrupted
from adaclip_finetune.training.trackers import Trackers

_PASSWORD = re.compile(r"(://[^:@/\s]*:)[^@\s]+@")  # in the URL of a database
_LOG = "train.log"
_EVENTS = "metrics.jsonl"
_MISSING = "missing_videos.txt"
_PACKAGES = ("torch", "torchvision", "open_clip_torch", "accelerate", "numpy", "pillow", "av", "safetensors")


class RunFolder:
    """Print, log and write for one run. Processes other than the main one print and write nothing.

    Within `with`, the folder is closed at the end however the run ends. `path` is None in other processes, with
    `no_output`, and until `open`, so that a run that is refused leaves no folder; what is written before is kept.
    """

    def __init__(self, config: Config, stream: TextIO | None = None, trial: Path | None = None) -> None:
        """Print to `stream` (default: stdout). `trial` is the folder of a tuning trial, without TensorBoard files."""
        self.path: Path | None = None
        self.events: list[dict[str, Any]] = []
        self._config, self._stream, self._trial = config, stream or sys.stdout, trial
        self._earlier: Path | None = None  # the folder of the run that this one resumes
        self._waiting: dict[str, str] = {}  # what was written before there was a folder
        self._started = time.monotonic()
        self._trackers: Trackers | None = None
        self._repeated: set[tuple[str, int]] = set()  # event and update that were recorded before the run was resumed
        self._lock: FolderLock | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Close the trackers and release the lock. After an interruption, say how to resume."""
        if isinstance(error, Interrupted) and self._trial is None:
            folder = self.path or self._earlier
            self.say("stopped. " + (f"To resume: python train.py --resume {folder}" if folder else "Nothing was saved"))
        try:
            if self._trackers is not None:
                self._trackers.end(whole=error is None)
        finally:
            if self._lock is not None:
                self._lock.release()

    def open(self, config: Config, device: str) -> None:
        """Make the folder for a run with these settings on this device (a description). Raise UserError if it fails."""
        if self._config.no_output or not is_main():
            return
        try:
            if self._trial is None:
                name = f"{datetime.now():%Y%m%d-%H%M%S}-{config.peft.method}"
                folder = new_folder(Path(config.output_dir) / config.dataset, name)
            else:
                folder = self._trial
                folder.mkdir(parents=True)
            self._begin(folder, config, step=0)
        except OSError as error:
            raise UserError(f"output_dir: cannot make a run folder ({error}); set output_dir or no_output") from error
        except UserError:  # a tracker does not start
            shutil.rmtree(folder)
            raise
        # A clip_backbone that is only the default says nothing if weights on disk determine the architecture.
        from_disk = config.clip_weights or config.resume
        unused = {"clip_backbone"} if from_disk and "clip_backbone" not in config.model_fields_set else set()
        self.write_json("config.json", config.model_dump(mode="json", exclude=unused))
        self.write_json("environment.json", _environment(device))

    def lock(self, path: Path) -> None:
        """Lock the folder of an earlier run. Raise UserError if another run holds the lock or that run is finished."""
        self._earlier = path
        if is_main():
            self._lock = FolderLock(path)
            self._lock.take()
        if (path / "metrics.json").exists():
            best = path / "best.safetensors"
            hint = f". To train on from its weights, begin a new run: --resume {best}" if best.exists() else ""
            raise UserError(f"resume: the run in {path} is finished (metrics.json){hint}")

    def reopen(self, path: Path, step: int, size: int) -> None:
        """Continue in the folder of an earlier run from update `step`, when metrics.jsonl had `size` bytes.

        Later events are dropped, since the run will repeat them. Raise UserError if the file is shorter.
        """
        if not is_main():
            return
        with (path / _EVENTS).open("ab+") as file:
            if file.tell() < size:
                raise UserError(f"resume: {path / _EVENTS} is incomplete: it should have at least {size} bytes")
            file.seek(size)
            with suppress(ValueError):  # the last line may be torn
                for line in file:
                    self._repeated.add((json.loads(line)["event"], json.loads(line)["step"]))
            file.truncate(size)
            file.seek(0)
            self.events = [json.loads(line) for line in file]
        if self.events:
            self._started -= self.events[-1]["seconds"]
        (path / _MISSING).unlink(missing_ok=True)  # found and noted again
        self._begin(path, self._config, step)

    def _begin(self, path: Path, config: Config, step: int) -> None:
        if self._lock is None:
            self._lock = FolderLock(path)
            self._lock.take()
        self._trackers = Trackers(config, path, step, self._trial is not None, self.say)
        self.path = path
        for name, text in self._waiting.items():
            self.append_text(name, text)

    def say(self, text: str = "") -> None:
        """Print a text, without tearing a progress bar, and append it to train.log.

        It never fails: no run is lost because its terminal, or the disk of its log, is gone.
        """
        if is_main():
            with suppress(UserError):
                self.append_text(_LOG, f"{text}\n")
            # AttributeError: Python was started with a closed stdout. ValueError: the stream was closed since.
            with suppress(OSError, ValueError, AttributeError):
                tqdm.write(text, file=self._stream)
                self._stream.flush()

    def note_missing(self, what: str, reasons: Mapping[str, str]) -> None:
        """Print `what` and the videos that cannot be read, if any, and note them with reasons in missing_videos.txt."""
        if reasons:
            self.say(f"{what}:\n{listing(reasons)}")
            self.append_text(_MISSING, "".join(f"{video}\t{reason}\n" for video, reason in reasons.items()))

    def record(self, event: str, step: int, **values: Any) -> None:
        """Append a line to metrics.jsonl, and give its numbers to the trackers. `step` counts updates."""
        line = {"event": event, "step": step, "seconds": round(time.monotonic() - self._started, 3), **values}
        self.events.append(line)
        self.append_text(_EVENTS, json.dumps(line, allow_nan=False) + "\n")
        if self._trackers is not None:
            numbers = {f"{event}/{name}": value for name, value in _numbers(values)}
            self._trackers.log(numbers, step, (event, step) in self._repeated)

    def file(self, name: str) -> Path | None:
        """Return the path for a file of this name in the folder, None if nothing is to be written."""
        return None if self.path is None else self.path / name

    def append_text(self, name: str, text: str) -> None:
        """Append to a text file (UTF-8) in the folder. Raise UserError if that fails."""
        if self.path is None:
            self._waiting[name] = self._waiting.get(name, "") + text
            return
        try:
            with (self.path / name).open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"{self.path / name} could not be written: {error}") from error

    def flushed_events(self) -> int:
        """Flush metrics.jsonl to disk and return its size in bytes."""
        assert self.path is not None
        with (self.path / _EVENTS).open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file in the open folder, whole or not at all. Raise UserError if that fails."""
        if self.path is None:
            return
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            write_durably(self.path / name, text.encode())
        except OSError as error:
            raise UserError(f"{self.path / name} could not be written: {error}") from error

    def drop_unfinished(self) -> None:
        """Delete what only an unfinished run needs: snapshots, and finished batches of an evaluation."""
        if self.path is not None:
            for path in [*self.path.glob("last-*"), *self.path.glob(".last-*"), self.path / "embeddings"]:
                shutil.rmtree(path, ignore_errors=True)


def new_folder(parent: Path, name: str) -> Path:
    """Make a folder of this name in `parent`, with a number added if it exists, and return it. Raise OSError."""
    for attempt in itertools.count():
        path = parent / (name if attempt == 0 else f"{name}-{attempt}")
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            break
    return path


def _environment(device: str) -> dict[str, Any]:
    """Return what a figure was measured on: command, versions and machine."""
    return {
        "command": [_PASSWORD.sub(r"\1***@", word) for word in sys.argv],
        "processes": world_size(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "packages": {"adaclip-finetune": __version__, **{name: version(name) for name in _PACKAGES}},
    }


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, float(value)
