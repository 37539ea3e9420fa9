"""What memory an evaluation needs: one batch of blank videos through the model, and all that is kept of a gallery."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from adaclip_finetune.check.disk import embedding_bytes, kept_rows, tensor_bytes
from adaclip_finetune.check.memory import gallery
from adaclip_finetune.check.source import Split
from adaclip_finetune.data.blank import blank_videos
from adaclip_finetune.training.device import peak_memory_mib
from adaclip_finetune.training.memory import explain_out_of_memory_in_evaluation
from adaclip_finetune.training.session import Session

_ON_A_CPU = 2  # videos that are tried there; more would take minutes


@dataclass(frozen=True)
class EvaluationTrial:
    """peak_bytes: of the device's memory, on a CPU all that this process would hold. `refused`: why a batch did not
    fit, in words; the figure is then 0."""

    peak_bytes: int
    refused: str = ""


def try_evaluation(trial: Session, split: Split) -> EvaluationTrial:
    """A whole batch on a GPU, on a CPU a few videos of one, whose figures are extrapolated."""
    device, batch = trial.device, gallery(split, trial.config).batch
    tried = min(_ON_A_CPU, batch) if device.type == "cpu" else batch
    refused = ""
    try:
        widest = _forward(trial, tried)
    except (RuntimeError, MemoryError) as error:
        explained = explain_out_of_memory_in_evaluation(error, trial.config, device)
        if explained is None:
            raise
        refused = str(explained)
    if refused:  # here nothing holds the tensors of the failed batch any more
        clear_device_cache(garbage_collection=True)
        return EvaluationTrial(0, refused)
    if device.type != "cpu":
        return EvaluationTrial(int(peak_memory_mib(device) * 2**20))
    # Zero-shot is measured with a CLIP of its own where the model came from a checkpoint.
    again = tensor_bytes(trial.loaded.module.state_dict().values()) if trial.config.resume else 0
    kept = embedding_bytes(trial, split, kept_rows(trial))
    return EvaluationTrial(int(psutil.Process().memory_info().rss) + again + kept + widest * batch // tried)


def _forward(trial: Session, count: int) -> int:
    """Bytes that the widest module takes and gives."""
    widest = 0

    def note(_: nn.Module, given: tuple[object, ...], made: object) -> None:
        nonlocal widest
        widest = max(widest, tensor_bytes(tensor for tensor in (*given, made) if isinstance(tensor, Tensor)))

    hooks = [module.register_forward_hook(note) for module in trial.model.modules()]
    try:
        trial.model.eval()
        batch = blank_videos(trial.config.num_frm, trial.model.views(), count).to(trial.device)
        with torch.no_grad(), trial.autocast():
            trial.model.encode_video(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return widest
