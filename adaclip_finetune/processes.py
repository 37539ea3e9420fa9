"""Several processes that train or evaluate one model together: which of them this is, and what they tell each other.

A single process needs no process group: everything here then answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from adaclip_finetune.errors import UserError

T = TypeVar("T")

_LOST = re.compile("connection (closed|reset) by peer", re.IGNORECASE)  # gloo's words


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _group() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if _group() else 0


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def gather_objects(value: T) -> list[T]:
    """What each process gave, in the order of the processes: on every process. Any picklable value."""
    if not _group():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_main(value: T) -> T:
    """What the main process gave, on every process."""
    if not _group():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    told: T = box[0]
    return told


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, the same ones in every process, with those of the main process."""
    if _group():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def explain_lost_process(error: RuntimeError) -> UserError | None:
    """What to tell in a process that waited for one which is gone; None for other errors."""
    if not _group() or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
        return None
    first_line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return UserError(
        "another process of this run has ended, and what it said itself tells why; or it cannot be reached: "
        f"{first_line}"
    )


def part() -> None:
    """Leave the others, all work being done."""
    if _group():
        dist.destroy_process_group()


def _group() -> bool:
    return dist.is_available() and dist.is_initialized()
