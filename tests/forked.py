"""Processes of their own for tests, forked from a server that has imported what takes seconds, once for all of them."""

import multiprocessing
import multiprocessing.context
import sys
from pathlib import Path

import torch

# The package, and what torch and IBS import on their way. No test module: those are not on the server's path.
_PRELOADED = ["adaclip_finetune.training.trainer", "torch._dynamo", "torch.distributed.nn", "sklearn.cluster"]


def context() -> multiprocessing.context.ForkServerContext:
    """Where such processes are started."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_PRELOADED)
    return server


def begin(log: Path) -> None:
    """To be called first in such a process: what it prints goes to `log`."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for reading processes, which would inherit forkserver
    sys.stdout = sys.stderr = log.open("a")
