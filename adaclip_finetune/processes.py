"""The group of processes that train or evaluate one model together, and what they tell each other.

A single process needs no process group: every function then returns at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _has_group() else 1


def rank() -> int:
    """Return the number of this process, counted from 0."""
    return dist.get_rank() if _has_group() else 0


def is_main() -> bool:
    """Return whether this is the process that prints and writes."""
    return rank() == 0


def gather_objects(value: T) -> list[T]:
    """Return the values of all processes (anything that can be pickled), ordered by rank, in every process."""
    if not _has_group():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_main(value: T) -> T:
    """Return the main process's value in every process."""
    box = [value]
    if _has_group():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of the main process. Every process passes the same tensors in the same order."""
    if _has_group():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def leave_group() -> None:
    """Leave the process group at the end of the work, so that torch does not warn at exit."""
    if _has_group():
        dist.destroy_process_group()


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()
