"""Evaluations in processes of their own, several together or one that is killed, for the tests of evaluation."""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import forked
import torch
import torch.distributed as dist

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.parts import PartFolder
from adaclip_finetune.evaluation.tasks.retrieval import RetrievalReport
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.training.measure import build_task
from adaclip_finetune.weights.clip_weights import load_clip

Settings = dict[str, Any]


def evaluated(settings: Settings, keep: Path | None = None, seed: int = 0, diverged: bool = False) -> Settings:
    """Evaluate test_annot with a model drawn from `seed`, and return the result, to the last bit, as JSON holds it."""
    return summary(report_of(load_config(None, settings), keep, seed, diverged))


def report_of(config: Config, keep: Path | None = None, seed: int = 0, diverged: bool = False) -> Any:
    """Measure a model drawn from `seed` on test_annot by the task of its settings."""
    assert config.test_annot is not None
    torch.manual_seed(seed)
    loaded = load_clip(config)
    model = VideoRetriever(config, loaded)
    if diverged:
        torch.nn.init.constant_(next(model.parameters()), float("nan"))
    split = evaluation_split(config, config.test_annot)
    with closing(build_task(config, split, loaded, model, "test")) as task:
        return task(model, keep)


def summary(result: RetrievalReport) -> Settings:
    matrix = None
    if result.similarity is not None:
        matrix = hashlib.sha256(torch.cat(list(result.similarity)).numpy().tobytes()).hexdigest()
    return {
        "figures": result.figures.as_state(),
        "videos": result.queries.video_ids,
        "texts": result.queries.texts,
        "usage": None if result.frame_usage is None else result.frame_usage.tolist(),
        "matrix": matrix,
    }


def outcome(action: Callable[[], Any]) -> Any:
    """Return what `action` returns or, by its name, the error that it raises."""
    try:
        return action()
    except (UserError, RuntimeError, ZeroDivisionError) as error:
        return {type(error).__name__: str(error)}


def together(count: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """Run `function(*arguments)` in `count` gloo processes and return the results in the order of the processes."""
    folder.mkdir()
    processes = [
        forked.context().Process(target=_member, args=(folder, rank, count, function, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert not any(process.exitcode for process in processes), (folder / "log").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def killed(settings: Settings, keep: Path, call: int, log: Path) -> None:
    """Evaluate in a process that is killed before it keeps batch number `call`, from 0."""
    process = forked.context().Process(target=_killed, args=(settings, keep, call, log))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, log.read_text()


def _member(folder: Path, rank: int, count: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    forked.begin(folder / "log")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    found = function(*arguments)
    dist.barrier()
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def _killed(settings: Settings, keep: Path, call: int, log: Path) -> None:
    forked.begin(log)
    original, calls = PartFolder.write, iter(range(100))

    def write(*arguments: Any) -> None:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments)

    PartFolder.write = write  # type: ignore[method-assign]
    evaluated(settings, keep)
