"""Choose the device, the precision and torch's switches, join the processes of a launcher, and describe the device."""

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

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_WAYS_OUT = {
    "cuda": "Install a CUDA build of torch and an NVIDIA driver (CUDA_VISIBLE_DEVICES must not hide the device)",
    "xpu": "Install the XPU build of torch and Intel's GPU driver (ZE_AFFINITY_MASK must not hide the device)",
    "mps": "Use a Mac with Apple silicon",
}
_GROUP_TIMEOUT = timedelta(hours=2)  # The main process may rank a large gallery while the others wait.

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
    apply_switches(config)
    accelerator = _build_accelerator(_PRECISION[config.precision], on_cpu, processes)
    found = accelerator.device.type
    if wanted not in ("auto", found) or accelerator.num_processes != processes:
        raise UserError(
            f"device is {wanted} and WORLD_SIZE is {processes}, but accelerate {accelerate_version} with torch "
            f"{torch.__version__} uses {found} and {accelerator.num_processes} processes. Set device to {found}, or "
            "hide that device (CUDA_VISIBLE_DEVICES=''); start several processes with torchrun or accelerate launch, "
            "and unset WORLD_SIZE for one"
        )
    if config.precision == "fp16" and found == "cpu":
        raise UserError("precision: fp16 is not available on the CPU; choose bf16 or fp32")
    return accelerator


def apply_switches(config: Config) -> None:
    """Set `tf32` and `deterministic` for the whole process, whatever an earlier run in it had set.

    Call it before CUDA is used, since cuBLAS reads its environment variable only once. Without `tf32`, convolutions
    compute in float32 too; torch alone would round them to TF32.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    torch.backends.cudnn.benchmark = False


def explain_nondeterminism(error: BaseException) -> UserError | None:
    """Return a message if `deterministic` met an operation without a deterministic form, and None for other errors."""
    known = ("does not have a deterministic implementation", "not deterministic because it uses CuBLAS")
    if isinstance(error, RuntimeError) and any(words in str(error) for words in known):
        what = str(error).partition(", but you set")[0].rstrip(".")
        return UserError(
            f"deterministic: {what}. Train without deterministic (the same seed then gives nearly the same figures), "
            "or with --device cpu"
        )
    return None


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
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot use this device or precision, or join the {processes} processes of WORLD_SIZE at MASTER_ADDR "
            f"{os.environ.get('MASTER_ADDR')} with one device for each of them: {error}"
        ) from error


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
