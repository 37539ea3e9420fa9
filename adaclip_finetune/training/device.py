"""Where to compute: the accelerator that `device`, `xpu` and `precision` ask for, and what it says about itself."""

from __future__ import annotations

import os
import resource
import sys

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_WAYS_OUT = {
    "cuda": "install a CUDA build of torch and an NVIDIA driver",
    "xpu": "install PyTorch's own XPU build (README) and Intel's GPU driver; ZE_AFFINITY_MASK must not hide it",
    "mps": "needs a Mac with Apple silicon",
}


def make_accelerator(config: Config) -> Accelerator:
    """The one place that decides on device and mixed precision. Raises UserError for a device that is not there."""
    wanted = config.device
    if wanted in _WAYS_OUT and not _available(wanted):
        raise UserError(
            f"device: no {wanted} device is usable here. Either {_WAYS_OUT[wanted]}, or choose device auto or cpu"
        )
    if not torch.distributed.is_initialized():
        # accelerate keeps its state for the whole process; a second fit() in one process may want another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=_PRECISION[config.precision], cpu=wanted == "cpu")
    found = accelerator.device.type
    if wanted not in ("auto", found):
        raise UserError(
            f"device: {wanted} was asked for, but {found} takes precedence on this machine; choose device auto"
        )
    if config.precision == "fp16" and found == "cpu":
        raise UserError("precision: fp16 needs an accelerator; on the CPU choose bf16 or fp32")
    return accelerator


def describe_device(device: torch.device) -> str:
    """The device in words, for the log and environment.json."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type == "xpu":
        return f"xpu: {torch.xpu.get_device_name(device)}"
    return f"{device.type}: {torch.get_num_threads()} threads of {os.cpu_count()} processors"


def peak_memory_mib(device: torch.device) -> float:
    """The most memory in use so far, in MiB: of the accelerator, or on a CPU of this process."""
    if device.type in ("cuda", "xpu"):
        return float(getattr(torch, device.type).max_memory_allocated(device)) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _available(kind: str) -> bool:
    if kind == "mps":
        return torch.backends.mps.is_available()
    return bool(getattr(torch, kind).is_available())
