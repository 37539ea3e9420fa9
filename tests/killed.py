"""Runs in processes of their own, which kill themselves at a chosen place: for the tests of going on."""

import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import forked

from adaclip_finetune.config import load_config
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.evaluation.parts import PartFolder
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval
from adaclip_finetune.training import outcome, snapshot, trainer
from adaclip_finetune.training.evaluate_only import evaluate_only
from adaclip_finetune.training.signals import Interrupted
from adaclip_finetune.training.trainer import Trainer

# Place → what is called there; the process ends in the middle of such a call, or before it.
PLACES: dict[str, tuple[Any, str]] = {
    "update": (Trainer, "_update"),
    "save": (snapshot, "save_tensors"),
    "pointer": (snapshot, "write_durably"),
    "evaluation": (Retrieval, "__call__"),
    "embedded": (PartFolder, "write"),
}


def run(settings: dict[str, Any], log: Path, place: str = "", call: int = 0, signum: int = signal.SIGKILL) -> int:
    """One run, or with `resume` the rest of one, in a process of its own; returns its exit code, negative for a signal.

    With a place, `signum` is sent to the process at that call of it.
    """
    process = forked.context().Process(target=_run, args=(settings, log, place, call, signum))
    process.start()
    process.join(120)
    assert process.exitcode is not None, f"still running: {log.read_text()}"
    return process.exitcode


def _run(settings: dict[str, Any], log: Path, place: str, call: int, signum: int) -> None:
    forked.begin(log)
    trainer.draw_curves = outcome.draw_frame_usage = lambda *_: None  # a third of the time, and tested elsewhere
    if place:
        owner, name = PLACES[place]
        setattr(owner, name, _killing(getattr(owner, name), call, signum))
    config = load_config(None, settings)
    folder = Path(config.resume) if config.resume and Path(config.resume).is_dir() else None
    try:
        config = continued_config(config) if folder else config
        if config.do_inference:
            evaluate_only(config, folder)
        else:
            trainer.fit(config, folder=folder)
    except Interrupted as stop:
        sys.exit(stop.exit_code)


def _killing(function: Callable[..., Any], call: int, signum: int) -> Callable[..., Any]:
    calls = []

    @wraps(function)
    def killing(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signum)
        return function(*arguments, **named)

    return killing
