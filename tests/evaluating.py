"""Evaluations in processes of their own, several together or one that kills itself: for the tests of evaluation."""

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

from adaclip_finetune.config import load_config
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.parts import PartFolder
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval, RetrievalReport
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.weights.clip_weights import load_clip

Settings = dict[str, Any]


def evaluated(settings: Settings, keep: Path | None = None, seed: int = 0, diverged: bool = False) -> Settings:
    """All that an evaluation of test_annot finds, to the last bit, as JSON holds it. The model's own parts are drawn
    from `seed`."""
    config = load_config(None, settings)
    assert config.test_annot is not None
    torch.manual_seed(seed)
    loaded = load_clip(config)
    model = VideoRetriever(config, loaded)
    if diverged:
        torch.nn.init.constant_(next(model.parameters()), float("nan"))
    split = evaluation_split(config, config.test_annot)
    with closing(Retrieval(config, split, loaded, model.views(), "test")) as task:
        return summary(task(model, keep))


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
    """What it gives, or how it fails: JSON either way."""
    try:
        return action()
    except (UserError, RuntimeError, ZeroDivisionError) as error:
        return {type(error).__name__: str(error)}


def together(count: int, function: Callable[[], Any], *arguments: Any, folder: Path) -> list[Any]:
    """What `function(*arguments)` gives in each of `count` gloo processes."""
    context = forked.context()
    folder.mkdir()
    processes = [
        context.Process(target=_member, args=(folder, rank, count, function, arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    log = (folder / "log").read_text()
    if any(process.exitcode for process in processes):
        for process in processes:
            process.kill()
        raise AssertionError(f"exit codes {[process.exitcode for process in processes]}: {log}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def killed(settings: Settings, keep: Path, call: int, log: Path) -> None:
    """An evaluation in a process that is killed when it is about to keep batch number `call`, from 0."""
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
    original, calls = PartFolder.write, []

    def write(*arguments: Any) -> None:
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(1)
        original(*arguments)

    PartFolder.write = write  # type: ignore[method-assign]
    evaluated(settings, keep)
