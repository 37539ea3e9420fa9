"""Weights on disk. A checkpoint is data: safetensors with the resolved config beside the tensors, nothing pickled.

A file is written beside its place, flushed and then renamed, so that a crash leaves the old one whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adaclip_finetune.errors import UserError
from adaclip_finetune.model.clip_weights import strict_load

FORMAT = "adaclip-finetune/1"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` to `path` atomically. `metadata` (strings) tells what they are."""
    temporary = path.with_name(f".{path.name}.part")
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(state, temporary, metadata={"format": FORMAT, **metadata})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written ({error}); what was there before is untouched") from error


def load_weights(path: Path, model: nn.Module) -> dict[str, str]:
    """Fill `model` from a checkpoint of ours, strictly, and return its metadata. Raises UserError."""
    if path.is_dir():
        raise UserError(f"resume: {path} is a folder; give a weights file in it, such as {path / 'best.safetensors'}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        state = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"resume: {path} cannot be read as safetensors: {error}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"resume: {path} was not written by adaclip (CLIP weights alone belong into clip_weights)")
    if metadata.get("content") == "adapter":
        raise UserError(f"resume: {path} holds only what differs from CLIP; give the best.safetensors beside it")
    strict_load(model, state, f"resume: {path}")
    return dict(metadata)
