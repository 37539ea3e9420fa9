"""Runs in processes of their own that kill themselves at a chosen place, for tests of resuming."""

import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import forked
from safetensors.torch import load_file
from torch import Tensor

from adaclip_finetune import report
from adaclip_finetune.config import load_config
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.evaluation.parts import PartFolder
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval
from adaclip_finetune.training import checkpoint, optimizer
from adaclip_finetune.training.evaluate_only import evaluate_only
from adaclip_finetune.training.signals import Interrupted
from adaclip_finetune.training.trainer import fit

# Place → the function at whose call the process ends.
PLACES: dict[str, tuple[Any, str]] = {
    "update": (optimizer, "clamp_logit_scale"),
    "save": (checkpoint, "save_tensors"),
    "saved": (checkpoint, "flush_folder"),
    "evaluation": (Retrieval, "__call__"),
    "embedded": (PartFolder, "write"),
}


def run(settings: dict[str, Any], log: Path, place: str = "", call: int = 0, signum: int = signal.SIGKILL) -> int:
    """Train (or resume, or evaluate) in a process of its own and return the exit code, negative for a signal.

    If a place is given, the process sends itself `signum` at the given call (from 1) of that place.
    """
    process = forked.context().Process(target=_run, args=(settings, log, place, call, signum))
    process.start()
    process.join(120)
    assert process.exitcode is not None, f"still running: {log.read_text()}"
    return process.exitcode


def whole_and_resumed(settings: dict[str, Any], output: Path) -> list[dict[str, Tensor]]:
    """Train twice, with a snapshot per update, and return the weights that each run leaves by name.

    The second run is killed in its fourth update and resumed. `output` is the folder of both.
    """
    states = []
    for which in ("whole", "killed"):
        given = {**settings, "save_every_steps": 1, "output_dir": str(output / which)}
        if which == "killed":
            assert run(given, output / "log", "update", 4) == -signal.SIGKILL
            given = {"resume": str(next((output / which / str(settings["dataset"])).iterdir()))}
        assert run(given, output / "log") == 0, (output / "log").read_text()
        folder = next((output / which / str(settings["dataset"])).iterdir())
        states.append(
            {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        )
    return states


def _run(settings: dict[str, Any], log: Path, place: str, call: int, signum: int) -> None:
    forked.begin(log)
    # Drawing takes a third of the time and is tested elsewhere.
    report.draw_curves = report.draw_frame_usage = lambda *_: None  # type: ignore[assignment]
    if place:
        owner, name = PLACES[place]
        setattr(owner, name, killing(getattr(owner, name), call, signum))
    config = load_config(None, settings)
    folder = Path(config.resume) if config.resume and Path(config.resume).is_dir() else None
    try:
        config = continued_config(config) if folder else config
        if config.do_inference:
            evaluate_only(config, folder)
        else:
            fit(config, folder=folder)
    except Interrupted as stop:
        sys.exit(stop.exit_code)


def killing(function: Callable[..., Any], call: int, signum: int) -> Callable[..., Any]:
    calls = []

    @wraps(function)
    def killing(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signum)
        return function(*arguments, **named)

    return killing
