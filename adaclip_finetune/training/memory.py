"""Memory: what a training step needs, the batch size that fits, and what to say when memory runs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from adaclip_finetune.config import Config
from adaclip_finetune.config.choices.objectives import ObjectiveSettings
from adaclip_finetune.data.blank import blank_videos
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.errors import UserError
from adaclip_finetune.objectives.base import Group, Objective
from adaclip_finetune.processes import gather_objects, world_size
from adaclip_finetune.training.backward import Backward
from adaclip_finetune.training.device import peak_memory_mib
from adaclip_finetune.training.optimizer import build_optimizer

Tokenize = Callable[[Sequence[str], int], Tensor]
R = TypeVar("R")

# Messages of errors that are not torch.OutOfMemoryError or MemoryError but mean the same: MPS and the CUDA driver; the
# CPU; numpy in a reading process; sizes beyond 64 bits; cuBLAS, cuDNN; Level Zero.
_MESSAGES = (
    *("out of memory", "DefaultCPUAllocator: can't allocate memory", "Unable to allocate"),
    *("Storage size calculation overflowed", "array is too big"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "OUT_OF_DEVICE_MEMORY", "OUT_OF_HOST_MEMORY"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device or the machine has too little memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | ValueError) and any(message in str(error) for message in _MESSAGES)


def explain_out_of_memory(error: BaseException, config: Config) -> UserError:
    """Return what to tell about an error that `is_out_of_memory`: its reason, and the settings that decide."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = next((line for line in lines if any(known in line for known in _MESSAGES)), lines[0])[:200]
    sizes = ("batch_size", "num_frm", "val_batch_size", "hidden_dim", "precision")
    return UserError(
        f"out of memory: {reason}. The settings are {', '.join(f'{name} {getattr(config, name)}' for name in sizes)}.\n"
        "Try --precision bf16, --gradient_checkpointing, --grad_cache_chunk, a smaller num_frm or top_k, or a smaller "
        "batch_size (IBS: pre_batch_size too), which contrasts each video with fewer others; in an evaluation a "
        "smaller --val_batch_size"
    )


@contextmanager
def memory_explained(config: Config) -> Iterator[None]:
    """Raise UserError, as `explain_out_of_memory` tells it, if something within does not fit into memory."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise explain_out_of_memory(error, config) from error


class StepCost(NamedTuple):
    """What a training step on `videos` videos costs.

    `seconds` (forward and backward) and `kept_bytes` (tensors kept for the backward pass, measured on a CPU only) grow
    with the batch; `update_seconds` (the optimizer's) does not. `peak_bytes` is the device's memory; on a CPU, all
    that this process needs.
    """

    videos: int
    seconds: float
    update_seconds: float
    kept_bytes: int
    peak_bytes: int


def has_memory_limit(device: torch.device) -> bool:
    """Return whether the device refuses what does not fit. A CPU swaps, or the system ends the process."""
    return device.type != "cpu"


def fitting_batch_size(
    config: Config,
    objective: Objective,
    tokenize: Tokenize,
    accelerator: Accelerator,
    say: Callable[[str], None],
    batch_size: int,
) -> int:
    """Return the largest of batch_size, its half, its quarter and so on at which a training step fits into memory.

    The result is at least 2 and the same in all processes; on a CPU it is batch_size. Weights and buffers stay as they
    are. Raise UserError if no batch fits.
    """
    device = accelerator.device
    if not has_memory_limit(device):
        say("auto_batch_size is ignored on the CPU, which has no out-of-memory error to probe")
        return batch_size
    objective.retriever.start_epoch(0)
    smallest, size = min(batch_size, max(2, world_size())), batch_size
    buffers = [(buffer, buffer.clone()) for buffer in objective.buffers()]
    while True:
        cost = try_steps(config, objective, tokenize, accelerator, -(-size // world_size()))
        failures = [told for told in gather_objects(cost if isinstance(cost, str) else "") if told]
        if not failures:
            break
        if size <= smallest:
            smallest_config = config.model_copy(update={"batch_size": size})
            raise explain_out_of_memory(MemoryError(failures[0]), smallest_config)
        size = max(size // 2, smallest)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    if size < batch_size:
        say(f"auto_batch_size: a batch of {batch_size} does not fit into memory; it is {size} from here on")
    return size


def try_steps(
    config: Config, objective: Objective, tokenize: Tokenize, accelerator: Accelerator, size: int
) -> StepCost | str:
    """Take two training steps on blank videos with captions of full length, and return what the second one costs.

    The learning rate is 0, so the weights stay as they are; gradients are None afterwards. If a step does not fit into
    memory, return the message of that error.
    """
    cost = attempt(lambda: _two_steps(config, objective, tokenize, accelerator, size))
    objective.zero_grad()
    return cost


def attempt(call: Callable[[], R]) -> R | str:
    """Return what `call` returns or, if it runs out of memory, the error's message."""
    try:
        return call()
    except (RuntimeError, ValueError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error) or "out of memory"
    clear_device_cache(garbage_collection=True)  # only outside `except` are the tensors of the failed call free
    return reason


def blank_batch(config: Config, objective: Objective, tokenize: Tokenize, size: int) -> tuple[TrainBatch, Group]:
    """Return one process's batch of `size` blank videos with captions of max_txt_len tokens."""
    again, settings = objective.second_view(config), objective.settings
    halves = isinstance(settings, ObjectiveSettings) and settings.uses_unlabelled
    batch = TrainBatch(
        blank_videos(config.num_frm, objective.retriever.views(), size),
        [f"video {number}" for number in range(size)],
        tokenize([" ".join(["video"] * config.max_txt_len)] * size, config.max_txt_len),
        torch.zeros(size, config.num_frm),
        again and blank_videos(again[0].num_frm, again[1], size),
        torch.arange(size) % 2 == 0 if halves else None,
    )
    if config.uses_auxiliary:
        batch = replace(batch, auxiliary_ids=batch.token_ids, has_auxiliary=torch.ones(size, dtype=torch.bool))
    return batch, Group([batch.pairs()])


def _two_steps(
    config: Config, objective: Objective, tokenize: Tokenize, accelerator: Accelerator, size: int
) -> StepCost:
    device = accelerator.device
    optimizer, _ = build_optimizer(objective, config, total_steps=2)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    learning = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    # DistributedDataParallel holds a second copy of the gradients, ema_decay one of the weights.
    copied = (world_size() > 1) + (config.ema_decay > 0)
    copies = [parameter.detach().clone() for parameter in learning for _ in range(copied)]
    held = (*objective.parameters(), *objective.frozen_weights())
    weights = {weight.untyped_storage().data_ptr() for weight in held}
    batch, pairs = blank_batch(config, objective, tokenize, size)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would refer to its own graph, which is then never freed

    def call(*arguments: Any, **named: Any) -> dict[str, Tensor]:
        kept.clear()
        hooks = saved_tensors_hooks(note, lambda tensor: tensor) if device.type == "cpu" else nullcontext()
        with accelerator.autocast(), hooks:
            return dict(objective(*arguments, **named))

    backward = Backward(accelerator, objective, call, config.grad_cache_chunk)
    # Gradients of an earlier batch are there while a later one is computed.
    batches = min(config.gradient_accumulation_steps, 2)
    objective.train()
    for _ in range(2):  # the first step allocates what the second finds
        started = _now(device)
        for _ in range(batches):
            backward(batch, pairs, int)
        computed = _now(device)
        if config.grad_norm != -1:
            torch.nn.utils.clip_grad_norm_(learning, config.grad_norm)
        for parameter in learning:
            if parameter.grad is not None:
                parameter.grad.zero_()
        gradients = sum(parameter.grad.nbytes for parameter in learning if parameter.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        updated = _now(device)
    kept_bytes = sum(count for storage, count in kept.items() if storage not in weights)
    on_cpu = psutil.Process().memory_info().rss + gradients + kept_bytes
    peak = on_cpu if device.type == "cpu" else int(peak_memory_mib(device) * 2**20)
    del copies
    return StepCost(size, (computed - started) / batches, updated - computed, kept_bytes, peak)


def _now(device: torch.device) -> float:
    """Return the time at which all the work queued on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.monotonic()
