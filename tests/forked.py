"""Processes for tests, forked from a server that has done the imports that take seconds once for all of them."""

import multiprocessing
import multiprocessing.context
import sys
from pathlib import Path

import torch

# The package, and what torch and IBS import later. Test modules are not on the server's path.
_PRELOADED = ["adaclip_finetune.training.trainer", "torch._dynamo", "torch.distributed.nn", "sklearn.cluster"]


def context() -> multiprocessing.context.ForkServerContext:
    """Return the multiprocessing context whose processes are forked from the server."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_PRELOADED)
    return server


def begin(log: Path) -> None:
    """Send the output of a process to the file `log`; the first call in each process."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for reading processes, which would inherit forkserver
    sys.stdout = sys.stderr = log.open("a")
