"""Weights on disk. A checkpoint is data: safetensors with the resolved config beside the tensors, nothing pickled.

A file is written beside its place, flushed and then renamed, so that a crash leaves the old one whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor, nn

from adaclip_finetune.durable import beside
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.frame_features import FrozenClipBackbone
from adaclip_finetune.weights.checkpoints import Checkpoint, Kind, read_checkpoint
from adaclip_finetune.weights.clip_weights import strict_load

FORMAT = "adaclip-finetune/1"


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


def load_weights(path: Path, model: nn.Module) -> dict[str, str]:
    """Fill `model` from a checkpoint of any kind, strictly, and return its metadata. Raises UserError."""
    checkpoint = read_checkpoint(path)
    fill(model, checkpoint)
    return checkpoint.metadata


def fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's tensors into `model`, strictly; an adapter's over the pretrained CLIP that is in it.

    Raises UserError.
    """
    check_version(checkpoint)
    state = checkpoint.state
    if checkpoint.kind is Kind.ADAPTER:
        own = model.state_dict()
        state = {name: own[name] for name in _brought_by_clip(model)} | state
    strict_load(model, state, f"resume: {checkpoint.path}")


def check_version(checkpoint: Checkpoint) -> None:
    """Raise UserError for a file of ours from a version that wrote another format."""
    written = checkpoint.metadata.get("format", FORMAT)
    if written != FORMAT:
        raise UserError(f"resume: {checkpoint.path} has the format {written}; this version of adaclip reads {FORMAT}")


def _brought_by_clip(model: nn.Module) -> Iterator[str]:
    """Names of what an adapter may lack: CLIP's parameters, and a frozen copy of its image tower."""
    for name, _ in model.named_parameters():
        if name.startswith("clip."):
            yield name
    for name, module in model.named_modules():
        if isinstance(module, FrozenClipBackbone):
            yield from (f"{name}.{inner}" for inner in module.state_dict())
