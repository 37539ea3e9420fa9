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

from adaclip_finetune.check.model import TrialModel
from adaclip_finetune.data.blank import blank_videos
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.model.hard_topk import annealed_k, selection_temperature
from adaclip_finetune.training.device import peak_memory_mib
from adaclip_finetune.training.gather import PairSimilarity
from adaclip_finetune.training.memory import explain_out_of_memory, is_out_of_memory
from adaclip_finetune.training.objective import contrastive_loss
from adaclip_finetune.training.optimizer import build_optimizer, clip_gradients
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


def try_steps(trial: TrialModel, batch_size: int) -> StepTrial:
    """At the largest K of the run. Changes the weights of the trial model. Raises UserError where a run would."""
    config, device = trial.config, trial.accelerator.device
    optimizer, _ = build_optimizer(trial.model, config, total_steps=2)
    k = annealed_k(0, config.num_frm, config.top_k, config.warmup_epochs) if config.use_policy else config.num_frm
    size = min(2, batch_size)
    while True:
        refused = ""
        try:
            learning, updating, activations = _two_steps(trial, optimizer, size, k)
        except (RuntimeError, MemoryError) as error:
            if explained := explain_nondeterminism(error):
                raise explained from error
            if not is_out_of_memory(error):
                raise
            refused = str(explain_out_of_memory(error, config, device, size, k))
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


def _two_steps(trial: TrialModel, optimizer: Optimizer, size: int, k: int) -> tuple[float, float, int]:
    """Of the second step, since the first one prepares what others find: seconds of forward and backward, which grow
    with the batch; seconds of the update, which do not; bytes that the backward needs."""
    config, accelerator = trial.config, trial.accelerator
    batch = TrainBatch(
        blank_videos(config, trial.model.image_spec, size),
        trial.loaded.tokenize([" ".join(["video"] * config.max_txt_len)] * size, config.max_txt_len),
        torch.zeros(size, config.num_frm),
    )
    tau = selection_temperature(0, config.init_tau, config.min_tau, config.exp_decay_factor)
    weights = {parameter.untyped_storage().data_ptr() for parameter in trial.model.parameters()}
    trial.model.train()
    step, times, kept = PairSimilarity(trial.model), [0.0] * 3, dict[int, int]()
    for _ in range(2):
        kept.clear()
        times[0] = time.monotonic()
        with accelerator.autocast(), saved_tensors_hooks(partial(_note, kept), _same):
            similarity = step(batch.to(accelerator.device), [size], k, tau)
        loss = contrastive_loss(similarity)
        loss.backward()  # type: ignore[no-untyped-call]
        times[1] = _now(accelerator.device)
        clip_gradients(trial.model.parameters(), config.grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        times[2] = _now(accelerator.device)
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


def _held_on_cpu(trial: TrialModel) -> int:
    """Weights, moments and all else that this process holds between two steps, and the gradients of one."""
    gradients = sum(parameter.nbytes for parameter in trial.model.parameters() if parameter.requires_grad)
    return int(psutil.Process().memory_info().rss) + gradients
