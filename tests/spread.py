"""Several processes that find each other as torchrun's do, forked from one that has everything imported."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sklearn.cluster  # noqa: F401  what IBS imports on its way
import torch

import adaclip_finetune.training.trainer  # noqa: F401  what every target needs


def spread(target: Callable[..., None], processes: int, log: Path, *arguments: Any) -> list[int]:
    """Call target(*arguments) in that many processes of one group; their exit codes, in order of rank. What they print
    is in `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["spread", "killed"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        context.Process(target=_run, args=(target, rank, processes, port, log, arguments)) for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(90)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in started]


def _run(target: Callable[..., None], rank: int, processes: int, port: int, log: Path, arguments: Any) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    sys.stdout = sys.stderr = log.open("a")
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        target(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        raise
