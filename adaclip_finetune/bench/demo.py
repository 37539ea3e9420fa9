"""Row `demo`: the example run as a whole process, and how much of it is neither reading, forward nor backward."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from adaclip_finetune.bench.measure import Aim, Measured, Setup
from adaclip_finetune.errors import UserError

_REPOSITORY = Path(__file__).parents[2]
_EXPECTED = 40.0  # text to video R@1, which is 48.2 with seed 0
_PROGRAM = """
import json, sys
from adaclip_finetune.bench.demo import timed
from adaclip_finetune.cli import main
sys.exit(timed(main, *json.loads(sys.argv[1])))
"""


def demo(setup: Setup) -> Iterator[Measured]:
    """Run `cfgs/demo.json` once, whatever the number of turns, and check what it finds.

    Nothing is measured where the repository is not at hand. By processor time, the first step is what the main process
    has computed when the step is done.
    """
    if not (_REPOSITORY / "cfgs" / "demo.json").exists():
        print("not measured, since cfgs/demo.json belongs to the repository", flush=True)
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        words = ["--device", setup.device.type, "--precision", setup.precision, "--output_dir", name]
        words += _few_clips(folder) if setup.quick else []
        given = [name, time.time(), setup.device.type, setup.processor_time, words]
        started = setup.now()
        command = [sys.executable, "-c", _PROGRAM, json.dumps(given)]
        done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, errors="replace")
        seconds = {"the run": [setup.now() - started]}
        if done.returncode:
            raise UserError(f"bench: the demo ended with {done.returncode}: {done.stderr[-500:]}")
        parts: dict[str, float] = json.loads((folder / "parts.json").read_text())
        (metrics,) = folder.glob("*/*/metrics.json")
        recall = json.loads(metrics.read_text())["finetuned"]["t2v"]["R@1"]
    if not setup.quick and not recall >= _EXPECTED:
        raise UserError(f"bench: the demo found R@1 {recall}, where at least {_EXPECTED:g} is expected")
    seconds |= {"reading, forward, backward": [parts["reading"] + parts["computing"]]}
    seconds |= {"first step": [parts["first step"]], "8 s": [8.0]}
    aims = [Aim("the run", "reading, forward, backward", 0.9), Aim("first step", "8 s", 1)]
    yield Measured("cfgs/demo.json", seconds, aims, {"R@1": recall})


def _few_clips(folder: Path) -> list[str]:
    """Write annotations of eight clips a split, and return the flags of a run of one epoch with them."""
    flags = ["--num_epochs", "1", "--batch_size", "4"]
    for split in ("train", "val", "test"):
        clips = json.loads((_REPOSITORY / "dataset_example" / f"{split}.json").read_text())
        path = folder / f"{split}.json"
        path.write_text(json.dumps(dict(list(clips.items())[:8])))
        flags += [f"--{split}_annot", str(path)]
    return flags


def timed(
    main: Callable[[list[str]], int],
    folder: str,
    given: float,
    device: str,
    processor_time: bool,
    words: Sequence[str],
) -> int:
    """Run the demo with these flags by `main`, write the seconds of its parts into `folder`, and return the exit code.

    `given` is the time at which the command was given. "reading" is waiting for batches, by processor time also what
    the reading processes compute; "computing" is forward and backward passes, in evaluation too.
    """
    from adaclip_finetune.data.loader import GalleryLoader, TrainLoader
    from adaclip_finetune.model.retriever import VideoRetriever
    from adaclip_finetune.training.backward import Backward
    from adaclip_finetune.training.run_folder import RunFolder

    clock = Clock(Setup(torch.device(device), processor_time=processor_time))
    clock.time_iterations(TrainLoader, "epoch")
    clock.time_iterations(GalleryLoader, "read_videos")
    for owner, name in ((Backward, "__call__"), (VideoRetriever, "encode_video"), (VideoRetriever, "encode_text")):
        clock.time_calls(owner, name)
    record = RunFolder.record

    def noted(run: RunFolder, event: str, step: int, **values: Any) -> None:
        if event == "train":
            clock.seconds.setdefault("first step", time.process_time() if processor_time else time.time() - given)
        record(run, event, step, **values)

    RunFolder.record = noted  # type: ignore[method-assign,assignment]
    code = main(["train", "--config", "cfgs/demo.json", *words])
    if processor_time:
        readers = resource.getrusage(resource.RUSAGE_CHILDREN)
        clock.seconds["reading"] += readers.ru_utime + readers.ru_stime
    (Path(folder) / "parts.json").write_text(json.dumps(clock.seconds))
    return code


class Clock:
    """Times parts of a program from outside. What happens within a part that is being timed belongs to that part."""

    def __init__(self, setup: Setup) -> None:
        self.seconds = {"reading": 0.0, "computing": 0.0}
        self._setup, self._running = setup, False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time within to this part."""
        if self._running:
            yield
            return
        self._running, started = True, self._setup.now()
        try:
            yield
        finally:
            self._running = False
            self.seconds[name] += self._setup.now() - started

    def time_calls(self, owner: Any, name: str) -> None:
        """Count the calls of a method as computing."""
        method: Callable[..., Any] = getattr(owner, name)

        @wraps(method)
        def call(*given: Any, **named: Any) -> Any:
            with self.part("computing"):
                return method(*given, **named)

        setattr(owner, name, call)

    def time_iterations(self, owner: Any, name: str) -> None:
        """Count the steps of the iterator that a method returns as reading."""
        method: Callable[..., Iterator[Any]] = getattr(owner, name)

        @wraps(method)
        def iterate(*given: Any, **named: Any) -> Iterator[Any]:
            items = method(*given, **named)
            while True:
                with self.part("reading"):
                    item = next(items, None)
                if item is None:
                    return
                yield item

        setattr(owner, name, iterate)
