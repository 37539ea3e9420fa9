"""The run folder: everything a run leaves behind, and the one place that prints.

output/<dataset>/<timestamp>-<method>/
    config.json  environment.json  train.log  metrics.jsonl  tensorboard/  missing_videos.txt
    best.safetensors  adapter.safetensors  [last.safetensors]  metrics.json  curves.png  frame_usage.png
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError

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
    """Prints, logs and writes for one run. `path` is None with `no_output`, and until `open`, so that a run which is
    refused leaves no folder; what is said and written until then is kept and follows.
    """

    def __init__(self, config: Config, stream: TextIO | None = None) -> None:
        self.path: Path | None = None
        self.events: list[dict[str, Any]] = []
        self._config, self._stream = config, stream or sys.stdout
        self._waiting: dict[str, str] = {}
        self._started = time.monotonic()
        self._writer: SummaryWriter | None = None

    def open(self) -> None:
        """Make the folder. Raises UserError if that cannot be."""
        if self._config.no_output:
            return
        self.path = _new_folder(self._config)
        self._writer = SummaryWriter(self._config.tensorboard_dir or self.path / "tensorboard")
        self.write_json("config.json", self._config.model_dump(mode="json"))
        for name, text in self._waiting.items():
            self.append_text(name, text)
        self._waiting.clear()

    def say(self, text: str = "") -> None:
        """Print without tearing a progress bar, and keep the text in train.log."""
        tqdm.write(text, file=self._stream)
        self._stream.flush()
        self.append_text("train.log", f"{text}\n")

    def note_missing(self, reasons: Mapping[str, str]) -> None:
        """Video → reason: all of them go to missing_videos.txt, a line each."""
        self.append_text("missing_videos.txt", "".join(f"{video}\t{reason}\n" for video, reason in reasons.items()))

    def record(self, event: str, step: int, **values: Any) -> None:
        """One line of metrics.jsonl; its numbers go to TensorBoard too. `step` counts updates."""
        line = {"event": event, "step": step, "seconds": round(time.monotonic() - self._started, 3), **values}
        self.events.append(line)
        self.append_text("metrics.jsonl", json.dumps(line, allow_nan=False) + "\n")
        if self._writer is not None:
            for name, value in _numbers(values):
                self._writer.add_scalar(f"{event}/{name}", value, step)

    def file(self, name: str) -> Path | None:
        """Where a file of this name belongs, or None if nothing is to be written."""
        return None if self.path is None else self.path / name

    def append_text(self, name: str, text: str) -> None:
        if self.path is None:
            self._waiting[name] = self._waiting.get(name, "") + text
            return
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def write_json(self, name: str, content: Any) -> None:
        """Written at once or never: for files that stand when the folder is open."""
        if self.path is not None:
            text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            (self.path / name).write_text(text, encoding="utf-8")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def environment(device: str) -> dict[str, Any]:
    """What a figure was measured on: versions, machine, command."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _new_folder(config: Config) -> Path:
    parent = Path(config.output_dir) / config.dataset
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{config.peft.method}"
    try:
        for attempt in range(1000):
            path = parent / (stamp if attempt == 0 else f"{stamp}-{attempt}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            return path
    except OSError as error:
        raise UserError(
            f"output_dir: cannot make a run folder in {parent} ({error}); set output_dir or no_output"
        ) from error
    raise UserError(f"output_dir: {parent} holds a thousand run folders of this very second")


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
