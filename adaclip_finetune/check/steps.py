"""How long a training step takes and what memory it needs: a few real ones, on blank videos.

The batch grows from two videos to that of the run, as long as a step stays short; what is left is extrapolated.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import psutil
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from adaclip_finetune.training.device import peak_memory_mib
from adaclip_finetune.training.memory import blank_batch, explain_out_of_memory, is_out_of_memory
from adaclip_finetune.training.optimizer import build_optimizer, clip_gradients
from adaclip_finetune.training.session import Session
from adaclip_finetune.training.switches import explain_nondeterminism

_PATIENCE = {"cpu": 4.0}  # seconds that a step may take for the batch to be doubled
_ON_A_GPU = 30.0


@dataclass(frozen=True)
class StepTrial:
    """Of a batch of `batch_size` videos: measured if `tried` is the same, else extrapolated from `tried` videos.

    peak_bytes: of the device's memory, on a CPU all that this process holds. `refused`: why a batch of `tried` videos
    did not fit, in words; the other figures are then 0.
    """

    batch_size: int
    tried: int
    seconds: float
    peak_bytes: int
    refused: str = ""


def try_steps(trial: Session, batch_size: int) -> StepTrial:
    """At the largest K of the run. Changes the weights of the trial model. Raises UserError where a run would."""
    config, device = trial.config, trial.device
    optimizer, _ = build_optimizer(trial.objective, config, total_steps=2)
    trial.model.start_epoch(0)
    size = min(2, batch_size)
    while True:
        refused = ""
        try:
            learning, updating, activations = _two_steps(trial, optimizer, size)
        except (RuntimeError, MemoryError) as error:
            if explained := explain_nondeterminism(error):
                raise explained from error
            if not is_out_of_memory(error):
                raise
            refused = str(explain_out_of_memory(error, config, device, size, trial.model))
        if refused:  # here nothing holds the tensors of the failed step any more
            clear_device_cache(garbage_collection=True)
            return StepTrial(batch_size, size, 0.0, 0, refused)
        following = min(2 * size, batch_size)
        too_slow = 2 * learning > _PATIENCE.get(device.type, _ON_A_GPU)
        too_large = device.type == "cpu" and activations * following / size > psutil.virtual_memory().available
        if size == batch_size or too_slow or too_large:
            more = activations * (batch_size - size) // size
            peak = _held_on_cpu(trial) + activations if device.type == "cpu" else int(peak_memory_mib(device) * 2**20)
            return StepTrial(batch_size, size, learning * batch_size / size + updating, peak + more)
        size = following


def _two_steps(trial: Session, optimizer: Optimizer, size: int) -> tuple[float, float, int]:
    """Of the second step, since the first one prepares what others find: seconds of forward and backward, which grow
    with the batch; seconds of the update, which do not; bytes that the backward needs."""
    batch, group = blank_batch(trial.config, trial.model, trial.loaded.tokenize, size)
    weights = {parameter.untyped_storage().data_ptr() for parameter in trial.model.parameters()}
    trial.objective.train()
    times, kept = [0.0] * 3, dict[int, int]()
    for _ in range(2):
        kept.clear()
        times[0] = time.monotonic()
        with trial.autocast(), saved_tensors_hooks(partial(_note, kept), _same):
            terms = list(trial.objective(batch.to(trial.device), group).values())
        sum(terms[1:], terms[0]).backward()
        times[1] = _now(trial.device)
        clip_gradients(trial.objective.parameters(), trial.config.grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        times[2] = _now(trial.device)
    activations = sum(count for place, count in kept.items() if place not in weights)
    return times[1] - times[0], times[2] - times[1], activations


def _now(device: torch.device) -> float:
    """The time at which all that was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.monotonic()


def _note(kept: dict[int, int], tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    kept[storage.data_ptr()] = storage.nbytes()
    return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _held_on_cpu(trial: Session) -> int:
    """Weights, moments and all else that this process holds between two steps, and the gradients of one."""
    gradients = sum(parameter.nbytes for parameter in trial.model.parameters() if parameter.requires_grad)
    return int(psutil.Process().memory_info().rss) + gradients
