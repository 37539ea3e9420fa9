"""A cell of a grid: an ordinary run in a folder and a process of its own, which leaves a result.json.

In its own process, the peak memory of a cell is measured, and what kills it kills nothing else.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.config.roles import deciding_values
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.retrieval import RetrievalFigures, RetrievalReport
from adaclip_finetune.lock import Lock
from adaclip_finetune.strict_json import read_json
from adaclip_finetune.training.checkpoint import BEST
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.signals import EXIT_CODES, Interrupted
from adaclip_finetune.training.trainer import FitResult, fit

RESULT = "result.json"
ANNOTATIONS = ("train_annot", "val_annot", "test_annot")


@dataclass(frozen=True)
class Cell:
    """One run of the grid. `searched` is the value of the searched setting, None without a search.

    `start` is the cell from whose weights this one goes on, None if it begins with the pretrained CLIP.
    """

    method: str
    searched: Any
    seed: int
    label: str
    folder: Path
    config: Config
    start: Cell | None = None

    @property
    def weights(self) -> Path:
        """The weights of the best epoch, which are there if they are kept."""
        return self.folder / BEST

    @property
    def lock_path(self) -> Path:
        """The lock file, beside the folder, of the worker that trains the cell."""
        return self.folder.with_name(f"{self.folder.name}.lock")

    def lock(self) -> Lock:
        """Return a lock of the cell, not taken yet."""
        return Lock(self.lock_path, self.folder)

    @property
    def is_finished(self) -> bool:
        return (self.folder / RESULT).is_file()

    @property
    def is_kept(self) -> bool:
        """Whether a finished cell has its weights, or failed and has none."""
        return self.weights.is_file() or self.result()["failed"] is not None

    def result(self) -> dict[str, Any]:
        """Return the content of result.json."""
        return dict(read_json(self.folder / RESULT))

    def deciding(self) -> dict[str, Any]:
        """Return the settings on which the figures of the cell depend, and a digest of each annotation.

        Those of the cell from whose weights it goes on stand for the path of the weights, under `after`.
        """
        values = deciding_values(self.config, ANNOTATIONS)
        return values if self.start is None else values | {"resume": None, "after": self.start.deciding()}


def train_in_process(cell: Cell, keep_weights: bool) -> dict[str, Any]:
    """Train a cell and return its result. Raise UserError if it was refused before its folder was made.

    Weights of another cell that do not fit could not be refused before that was trained, and make a failed cell.
    """
    if cell.start is not None and cell.start.result()["failed"]:
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_result(cell.folder, {"settings": cell.deciding(), "failed": f"{cell.start.label} failed"}, keep_weights)
        return cell.result()
    if cell.folder.exists() and not has_snapshot(cell.folder):
        shutil.rmtree(cell.folder)  # it ended before anything was saved
    try:
        code = in_process(train_cell, cell.config, cell.folder, cell.deciding(), keep_weights)
    except UserError as error:
        if cell.start is None or cell.folder.exists():
            raise
        cell.folder.mkdir(parents=True)
        write_result(cell.folder, {"settings": cell.deciding(), "failed": str(error)}, keep_weights)
        return cell.result()
    if not cell.is_finished:
        if not cell.folder.exists():
            raise UserError(f"{cell.label}: the process ended with code {code} before it began")
        reason = f"the process was killed by signal {-code}: too little memory?" if code < 0 else f"exit code {code}"
        write_result(cell.folder, {"settings": cell.deciding(), "failed": reason}, keep_weights)
    return cell.result()


def has_snapshot(folder: Path) -> bool:
    """Return whether the run in a folder was interrupted after something was saved, so that it can be resumed."""
    return any(folder.glob("last-*")) and not (folder / "metrics.json").exists()


def train_cell(config: Config, folder: Path, settings: dict[str, Any], keep_weights: bool) -> None:
    """Train one cell, or resume it from its snapshot, and write its result.json."""
    run = RunFolder(config, stream=io.StringIO(), trial=folder)
    began = time.monotonic()
    try:
        if has_snapshot(folder):
            config = continued_config(load_config(None, {"resume": str(folder)}))
            found = fit(config, folder=folder, run=run)
        else:
            found = fit(config, run=run)
    except Exception as error:
        if not folder.exists():
            raise
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        run.append_text("train.log", f"FAILED: {reason}\n{traceback.format_exc()}")
        content: dict[str, Any] = {"settings": settings, "failed": reason}
    else:
        content = {"settings": settings, "failed": None, **measured(found, run, config)}
    write_result(folder, content | {"seconds": round(time.monotonic() - began, 1)}, keep_weights)


def measured(found: FitResult, run: RunFolder, config: Config) -> dict[str, Any]:
    """Return what the report needs of a finished run: figures, the rank of each query, and costs.

    A step is an update of a full batch in the last epoch, reading included, by the median over its steps. Peak memory
    is that of the device, on a CPU that of the process. `adapter_bytes` is None if the run wrote no adapter.
    """
    final, before = found.final, found.zero_shot
    assert isinstance(final, RetrievalReport) and run.path is not None
    steps = [event for event in run.events if event["event"] == "train"]
    last = [event["videos_per_second"] for event in steps if event["epoch"] == steps[-1]["epoch"]]
    videos = json.loads((run.path / "config.json").read_text())["batch_size"] * config.gradient_accumulation_steps
    adapter = run.path / "adapter.safetensors"
    kept = {"validation": "best_validation", "best_epoch": "best_epoch", "test": "finetuned", "zero_shot": "zero_shot"}
    return {
        **{name: found.metrics[one] for name, one in kept.items()},
        "parameters": found.metrics["parameters"],
        "adapter_bytes": adapter.stat().st_size if adapter.is_file() else None,
        "seconds_per_step": round(videos / statistics.median(last), 5),
        "memory_mib": max(event["memory_mib"] for event in steps),
        "ranks": {"t2v": final.metrics.t2v.ranks.tolist(), "v2t": final.metrics.v2t.ranks.tolist()},
        "zero_shot_ranks": before.metrics.t2v.ranks.tolist() if isinstance(before, RetrievalFigures) else None,
        "video_of_query": [final.queries.video_ids[video] for video in final.queries.video_of_text],
    }


def write_result(folder: Path, content: Mapping[str, Any], keep_weights: bool) -> None:
    """Write result.json, which makes the cell a finished one, after what is large was deleted."""
    large = [*folder.glob("last-*"), *folder.glob(".last-*"), folder / "embeddings"]
    if not keep_weights:
        large += [*folder.glob("*.safetensors"), folder / "tokenizer"]
    for path in large:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_durably(folder / RESULT, (json.dumps(content, ensure_ascii=False) + "\n").encode())


def in_process(target: Callable[..., None], *arguments: Any) -> int:
    """Run `target(*arguments)` in a process of its own and return the exit code, negative for a signal.

    The process ends with this one, even if this one is killed. Raise UserError if `target` does, and Interrupted, after
    the process has saved its work, if either of the two gets a signal.
    """
    context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":  # importing torch takes seconds, and is done once
        context.set_forkserver_preload(["adaclip_finetune.training.trainer"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_guarded, args=(target, sender, *arguments))
    process.start()
    sender.close()
    try:
        process.join()
    except KeyboardInterrupt:
        process.terminate()
        process.join()
        raise
    code = process.exitcode or 0
    if signum := next((signum for signum, known in EXIT_CODES.items() if code == known), None):
        raise Interrupted(signum)
    if receiver.poll():
        with suppress(EOFError):
            raise UserError(receiver.recv())
    return code


def _guarded(target: Callable[..., None], sender: Connection, *arguments: Any) -> None:
    """Run `target` as the main function of a process that ends with its parent, and send the message of UserError."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        target(*arguments)
    except UserError as error:
        sender.send(str(error))
    except KeyboardInterrupt as stop:
        sys.exit(getattr(stop, "exit_code", 130))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
