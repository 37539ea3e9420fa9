"""Choose the device and the precision, join the processes of a launcher, and describe the device."""

from __future__ import annotations

import importlib
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch
from accelerate import Accelerator
from accelerate import __version__ as accelerate_version
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler
from torch import nn
from torch.optim import Optimizer

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.switches import apply_switches

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_WAYS_OUT = {
    "cuda": "Install a CUDA build of torch and an NVIDIA driver (CUDA_VISIBLE_DEVICES must not hide the device)",
    "xpu": "Install the XPU build of torch and Intel's GPU driver (ZE_AFFINITY_MASK must not hide the device)",
    "mps": "Use a Mac with Apple silicon",
}
_GROUP_TIMEOUT = timedelta(hours=2)  # The main process may rank a large gallery while the others wait.
_IPEX = "intel_extension_for_pytorch"

# Left in the environment, accelerate would take any of these for a launch of several processes.
_LAUNCHED = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
)
# Variables from `accelerate config` or `accelerate launch` for what the settings of this project decide.
_OVERRIDDEN = (
    "ACCELERATE_USE_CPU",
    "ACCELERATE_TORCH_DEVICE",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)


def make_accelerator(config: Config) -> Accelerator:
    """Return the accelerator for `device`, `precision`, `tf32` and `deterministic`; join the processes of a launcher.

    It may be called again in a process with other settings; an existing process group is reused. Raise UserError if the
    device is not available or does not support what is asked.
    """
    for engine in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if _is_set(f"ACCELERATE_USE_{engine}"):
            raise UserError(
                f"the accelerate configuration asks for {engine}, which is not supported: several processes train with "
                "DistributedDataParallel (accelerate launch --multi_gpu, or torchrun)"
            )
    wanted, processes = config.device, launched_processes()
    if wanted in _WAYS_OUT and not _is_available(wanted):
        raise UserError(f"device: no {wanted} device is usable. {_WAYS_OUT[wanted]}, or set device to cpu")
    on_cpu = wanted == "cpu" or (
        wanted == "auto" and (_is_set("ACCELERATE_USE_CPU") or not any(map(_is_available, _WAYS_OUT)))
    )
    kind = "cpu" if on_cpu else next((kind for kind in ("cuda", "xpu") if _is_available(kind)), "cpu")
    local_rank = int(os.environ.get("LOCAL_RANK") or 0)
    if processes > 1 and kind != "cpu" and local_rank >= getattr(torch, kind).device_count():
        raise UserError(
            f"device: LOCAL_RANK is {local_rank}, but this machine has {getattr(torch, kind).device_count()} {kind} "
            "devices: start one process per device (--nproc_per_node), or set device to cpu"
        )
    apply_switches(config)
    accelerator = _build_accelerator(_PRECISION[config.precision], on_cpu, processes)
    found = accelerator.device.type
    if wanted not in ("auto", found):
        raise UserError(
            f"device is {wanted}, but accelerate {accelerate_version} with torch {torch.__version__} uses {found}. "
            f"Set device to {found}, or hide that device (CUDA_VISIBLE_DEVICES=''), or update the two packages"
        )
    if accelerator.num_processes != processes:
        raise UserError(
            f"WORLD_SIZE is {processes}, but torch {torch.__version__} cannot join {processes} processes on {found}: "
            "start them with torchrun or accelerate launch, or set device to cpu, or unset WORLD_SIZE for one process"
        )
    if config.precision == "fp16" and found == "cpu":
        raise UserError("precision: fp16 is not available on the CPU; choose bf16 or fp32")
    return accelerator


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

    MPS knows no peak; there it is the memory that its driver holds for this process.
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


def load_ipex(device: torch.device, say: Callable[[str], None]) -> ModuleType | None:
    """Return Intel's extension for PyTorch if the device is an XPU and a usable version is installed, else None.

    XPU works without the extension, which has been archived since March 2026. Each version fits one version of torch
    and ends the process when it is imported beside another, so the versions are compared first. `say` is told if an
    installed version is of no use.
    """
    if device.type != "xpu":
        return None
    try:
        found = version(_IPEX)
    except PackageNotFoundError:
        return None
    try:
        if found.split(".")[:2] != torch.__version__.split(".")[:2]:
            raise ImportError(f"it does not fit torch {torch.__version__}")
        return importlib.import_module(_IPEX)
    except (Exception, SystemExit) as error:
        say(f"{_IPEX} {found} is not used: {error}. XPU works without it")
        return None


def optimize_with_ipex(
    ipex: ModuleType | None, model: nn.Module, optimizer: Optimizer, say: Callable[[str], None]
) -> tuple[nn.Module, Optimizer]:
    """Return model and optimizer, optimized in place for training if `ipex` is given and succeeds."""
    if ipex is not None:
        try:
            model, optimizer = ipex.optimize(model.train(), optimizer=optimizer, inplace=True)
        except Exception as error:
            say(f"{_IPEX} could not optimize the model ({error}); it is trained without")
    return model, optimizer


def _build_accelerator(precision: str, on_cpu: bool, processes: int) -> Accelerator:
    # accelerate keeps its state for the whole process, but another run in it may use another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    if processes > 1:
        backend = {"backend": "gloo"} if on_cpu else {}
        handlers.append(InitProcessGroupKwargs(timeout=_GROUP_TIMEOUT, **backend))
    try:
        with _hidden(_OVERRIDDEN if processes > 1 else (*_OVERRIDDEN, *_LAUNCHED)):
            return Accelerator(mixed_precision=precision, cpu=on_cpu, kwargs_handlers=handlers)
    except torch.distributed.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(f"the {processes} processes could not connect at {where} (MASTER_ADDR): {error}") from error
    except ValueError as error:
        raise UserError(f"accelerate refuses this precision, device or WORLD_SIZE ({processes}): {error}") from error


def _is_available(kind: str) -> bool:
    return bool((torch.backends.mps if kind == "mps" else getattr(torch, kind)).is_available())


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")


@contextmanager
def _hidden(variables: Sequence[str]) -> Iterator[None]:
    """Remove environment variables within the block."""
    removed = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(removed)
