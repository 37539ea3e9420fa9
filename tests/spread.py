"""Processes that form a group, as those of torchrun do."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked


def spread(target: Callable[..., None], processes: int, log: Path, *arguments: Any) -> list[int]:
    """Call target(*arguments) in each of `processes` processes of a group and return their exit codes by rank.

    Their output is appended to the file `log`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        forked.context().Process(target=_run, args=(target, number, processes, port, log, arguments))
        for number in range(processes)
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
    forked.begin(log)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        target(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        raise
