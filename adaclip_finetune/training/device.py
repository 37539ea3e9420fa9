"""Where to compute: the accelerator that `device`, `xpu` and `precision` ask for, in one process or several, and what
the device says about itself."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate import __version__ as accelerate_version
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.switches import apply_switches

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_WAYS_OUT = {
    "cuda": "install a CUDA build of torch and an NVIDIA driver; CUDA_VISIBLE_DEVICES must not hide it",
    "xpu": "install PyTorch's own XPU build (README) and Intel's GPU driver; ZE_AFFINITY_MASK must not hide it",
    "mps": "needs a Mac with Apple silicon",
}
# The main process may rank a large gallery while the others wait.
_PATIENCE = timedelta(hours=2)

# What a launcher sets; the last ones count for accelerate even where nothing was launched.
_PLACE = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHED = ("WORLD_SIZE", *_PLACE, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# What accelerate reads from `accelerate config` or `accelerate launch`, and our settings decide.
_OURS_TO_DECIDE = (
    "ACCELERATE_USE_CPU",
    "ACCELERATE_TORCH_DEVICE",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
_OTHER_ENGINES = ("DEEPSPEED", "FSDP", "MEGATRON_LM")


def make_accelerator(config: Config) -> Accelerator:
    """The one place that decides on device, mixed precision, tf32 and determinism, and that lets the processes of
    torchrun or accelerate launch find each other.

    May be called again in a process, with other settings: a process group that is there is used again.
    Raises UserError for a device that is not there, or does not do what is asked.
    """
    _refuse_other_engines()
    wanted, processes = config.device, launched_processes()
    if wanted in _WAYS_OUT and not _available(wanted):
        raise UserError(
            f"device: no {wanted} device is usable here. Either {_WAYS_OUT[wanted]}, or choose device auto or cpu"
        )
    on_cpu = wanted == "cpu" or (
        wanted == "auto" and (_is_set("ACCELERATE_USE_CPU") or not any(map(_available, _WAYS_OUT)))
    )
    apply_switches(config)
    accelerator = _accelerator(_PRECISION[config.precision], on_cpu, processes)
    found = accelerator.device.type
    if wanted not in ("auto", found):
        raise UserError(
            f"device: {wanted} was asked for, but accelerate {accelerate_version} with torch {torch.__version__} takes "
            f"{found} on this machine. Choose device {found}, or hide it (CUDA_VISIBLE_DEVICES=''), or update these two"
        )
    if accelerator.num_processes != processes:
        raise UserError(
            f"device: {processes} processes were started, but on {found} they cannot work together with torch "
            f"{torch.__version__}; start one process, or choose device cpu"
        )
    if config.precision == "fp16" and found == "cpu":
        raise UserError("precision: fp16 needs an accelerator; on the CPU choose bf16 or fp32")
    return accelerator


def launched_processes() -> int:
    """How many processes torchrun or accelerate launch started; 1 without them. Raises UserError if that is unclear."""
    if (processes := _number("WORLD_SIZE", 1)) <= 1:
        return 1
    if missing := [name for name in _PLACE if not os.environ.get(name)]:
        raise UserError(
            f"the environment variable WORLD_SIZE is {processes}, but {', '.join(missing)} not set: start several "
            "processes with torchrun or accelerate launch (README), or unset WORLD_SIZE for a single one"
        )
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        _number(name, 0)
    return processes


def describe_device(device: torch.device) -> str:
    """The device in words, for the log and environment.json."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type == "xpu":
        return f"xpu: {torch.xpu.get_device_name(device)}"
    return f"{device.type}: {torch.get_num_threads()} threads of {os.cpu_count()} processors"


def peak_memory_mib(device: torch.device) -> float:
    """The most memory in use so far, in MiB: of the accelerator, or on a CPU of this process. MPS tells what its driver
    holds for this process, which hardly ever shrinks."""
    if device.type in ("cuda", "xpu"):
        return float(getattr(torch, device.type).max_memory_allocated(device)) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_mib` begin anew, where a device can."""
    if device.type in ("cuda", "xpu"):
        torch.get_device_module(device).reset_peak_memory_stats(device)


def total_memory_gib(device: torch.device) -> float:
    """What the device has in all, in GiB: of memory of its own, or on a CPU of the machine's."""
    if device.type in ("cuda", "xpu"):
        return float(getattr(torch, device.type).get_device_properties(device).total_memory) / 2**30
    if device.type == "mps":
        return torch.mps.recommended_max_memory() / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _accelerator(precision: str, on_cpu: bool, processes: int) -> Accelerator:
    if processes > 1 and not on_cpu:
        _refuse_shared_devices()
    # accelerate keeps its state for the whole process, and another run in it may want another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    if processes > 1:
        backend = {"backend": "gloo"} if on_cpu else {}
        handlers.append(InitProcessGroupKwargs(timeout=_PATIENCE, **backend))
    # Left to itself, accelerate makes a group of one process out of a stray variable.
    hidden = _OURS_TO_DECIDE if processes > 1 else (*_OURS_TO_DECIDE, *_LAUNCHED)
    try:
        with _without(hidden):
            return Accelerator(mixed_precision=precision, cpu=on_cpu, kwargs_handlers=handlers)
    except torch.distributed.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the {processes} processes could not find each other at {where} (MASTER_ADDR, MASTER_PORT): {error}"
        ) from error
    except ValueError as error:
        raise UserError(f"precision or device: accelerate refuses mixed precision {precision} here: {error}") from error


def _refuse_other_engines() -> None:
    for engine in _OTHER_ENGINES:
        if _is_set(f"ACCELERATE_USE_{engine}"):
            raise UserError(
                f"accelerate's settings ask for {engine}, which does not work here: several processes train with "
                "DistributedDataParallel (accelerate launch --multi_gpu, or torchrun)"
            )


def _refuse_shared_devices() -> None:
    for kind in ("cuda", "xpu"):
        if not _available(kind):
            continue
        devices, local_rank = getattr(torch, kind).device_count(), _number("LOCAL_RANK", 0)
        if local_rank >= devices:
            raise UserError(
                f"device: LOCAL_RANK is {local_rank}, but this machine shows {devices} {kind} devices: start one "
                "process a device (--nproc_per_node), or choose device cpu"
            )
        return


def _available(kind: str) -> bool:
    if kind == "mps":
        return torch.backends.mps.is_available()
    return bool(getattr(torch, kind).is_available())


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"the environment variable {variable} is {text!r}, not a number; unset it") from error


@contextmanager
def _without(variables: Sequence[str]) -> Iterator[None]:
    """Within it, these environment variables are not set."""
    hidden = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
