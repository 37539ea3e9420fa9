"""Weights on disk. A checkpoint is data: safetensors with the resolved config beside the tensors, nothing pickled.

A file is written beside its place, flushed and then renamed, so that a crash leaves the old one whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from adaclip_finetune.durable import beside
from adaclip_finetune.errors import UserError
from adaclip_finetune.weights.checkpoints import FORMAT


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` to `path` atomically. `metadata` (strings) tells what they are."""
    temporary = beside(path)
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(state, temporary, metadata={"format": FORMAT, **metadata})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written ({error}); what was there before is untouched") from error
