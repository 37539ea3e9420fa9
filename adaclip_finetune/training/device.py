"""Choose the device, the precision and torch's switches, join the processes of a launcher, and describe the device."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}

# With any of these in the environment, accelerate would wait for the other processes of a launch.
_LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def make_accelerator(config: Config) -> Accelerator:
    """Return the accelerator for `device`, `precision`, `tf32` and `deterministic`; join the processes of a launcher.

    It may be called again in a process with other settings; an existing process group is reused. Raise UserError if the
    device is not available or does not support what is asked.
    """
    for engine in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if _is_set(f"ACCELERATE_USE_{engine}"):
            raise UserError(f"accelerate is configured for {engine}, which is not supported: use --multi_gpu")
    wanted, processes = config.device, launched_processes()
    if wanted not in ("auto", "cpu") and not _is_available(wanted):
        raise UserError(
            f"device: no {wanted} device is usable. Install its driver and a torch for it, or set it to cpu"
        )
    on_cpu = wanted == "cpu" or (
        wanted == "auto" and (_is_set("ACCELERATE_USE_CPU") or not any(map(_is_available, ("cuda", "xpu", "mps"))))
    )
    if processes == 1:
        for name in _LAUNCHED:
            os.environ.pop(name, None)
    apply_switches(config)
    # accelerate keeps its state for the whole process, but another run in it may use another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    group = InitProcessGroupKwargs("gloo" if on_cpu else None, timeout=timedelta(hours=2))  # a large gallery takes long
    asked = f"device {wanted}, precision {config.precision} and WORLD_SIZE {processes}"
    try:
        accelerator = Accelerator(
            mixed_precision=_PRECISION[config.precision],
            cpu=on_cpu,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)] + [group] * (processes > 1),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # or accelerate would scale the loss
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot use {asked} with MASTER_ADDR {os.environ.get('MASTER_ADDR')}: {error}") from error
    found = accelerator.device.type
    if wanted not in ("auto", found) or accelerator.num_processes != processes:
        used = f"device {found} and {accelerator.num_processes} processes"
        raise UserError(f"asked for {asked}, but accelerate with torch {torch.__version__} uses {used}")
    if config.precision == "fp16" and found == "cpu":
        raise UserError("precision: fp16 is not available on the CPU; choose bf16 or fp32")
    if found == "cpu":
        keep_freed_memory()
    return accelerator


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step instead of returning it to the system; do nothing without glibc.

    Otherwise each large tensor is new memory, which Linux fills with zeros first: a fifth of a step's time in the demo.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    for option, size in ((trim_threshold, 2**31 - 1), (top_pad, 2**28), (mmap_threshold, 2**31 - 1)):
        mallopt(option, size)


def apply_switches(config: Config) -> None:
    """Set `tf32` and `deterministic` for the whole process, whatever an earlier run in it had set.

    Call it before CUDA is used, since cuBLAS reads its environment variable only once. Without `tf32`, convolutions
    compute in float32 too; torch alone would round them to TF32.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.deterministic != torch.are_deterministic_algorithms_enabled():  # setting it imports a compiler
        torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    torch.backends.cudnn.benchmark = False


def launched_processes() -> int:
    """Return how many processes torchrun or accelerate launch started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def describe_device(device: torch.device) -> str:
    """Return a one-line description of the device for the log and environment.json."""
    if device.type in ("cuda", "xpu"):
        return f"{device.type}: {torch.get_device_module(device).get_device_name(device)}"
    return f"{device.type}: {torch.get_num_threads()} threads of {os.cpu_count()} processors"


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory use in MiB: of the accelerator, or of this process on the CPU.

    On MPS, which knows no peak, it is the memory that its driver holds for this process.
    """
    if device.type in ("cuda", "xpu"):
        return float(torch.get_device_module(device).max_memory_allocated(device)) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def forget_peak_memory(device: torch.device) -> None:
    """Reset what `peak_memory_mib` returns, on devices that can."""
    if device.type in ("cuda", "xpu"):
        torch.get_device_module(device).reset_peak_memory_stats(device)


def total_memory_gib(device: torch.device) -> float:
    """Return the total memory of the device in GiB, on the CPU that of the machine."""
    if device.type in ("cuda", "xpu"):
        return float(torch.get_device_module(device).get_device_properties(device).total_memory) / 2**30
    if device.type == "mps":
        return torch.mps.recommended_max_memory() / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _is_available(kind: str) -> bool:
    return bool((torch.backends.mps if kind == "mps" else getattr(torch, kind)).is_available())


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")
