"""AdaBN (Li et al. 2017, "Revisiting Batch Normalization for Practical Domain Adaptation"): batch norms get the mean
and variance of the new data, and nothing of CLIP learns.

Batch norms are in the CNN of the frame selector (`policy_backbone`), and in convolutional image towers such as RN50.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adaclip_finetune.config.choices.peft import AdabnSettings
from adaclip_finetune.data.dataset import TrainBatch, VideoBatch
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.frame_features import CnnBackbone, FrozenClipBackbone
from adaclip_finetune.peft.base import PeftMethod, clip_of
from adaclip_finetune.processes import gather_objects


class AdaptiveBatchNorm(PeftMethod):
    """Estimates the statistics before training. If the CNN learns (`freeze_cnn` false), they follow its training."""

    settings: AdabnSettings

    def choose(self, model: nn.Module) -> None:
        if not batch_norms(model):
            raise UserError(
                "peft adabn: this model has no batch norm; take a CNN as policy_backbone, or another method"
            )
        clip_of(model).requires_grad_(False)

    @torch.no_grad()
    def before_training(self, model: nn.Module, batches: Iterator[TrainBatch]) -> None:
        norms = batch_norms(model)
        sums = [_Sums(norm) for norm in norms]
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        for norm in norms:
            norm.train()  # normalises each batch by its own statistics, as the layers behind it will see it
        try:
            for batch in islice(batches, self.settings.num_batches or None):
                if batch.videos.video_ids:
                    _look(model, batch.to(device).videos)
        finally:
            for own in sums:
                own.hook.remove()
        for norm, found in zip(norms, zip(*gather_objects([own.values for own in sums]), strict=True), strict=True):
            count, total, squares = (sum(part) for part in zip(*found, strict=True))
            if count > 1:
                mean = total / count
                norm.running_mean.copy_(mean)
                norm.running_var.copy_((squares / count - mean**2).clamp(min=0) * count / (count - 1))
        model.train(was_training)


class _Sums:
    """The number of values of each channel that a batch norm has seen, their sums and sums of squares, float64."""

    def __init__(self, norm: _BatchNorm) -> None:
        zeros = torch.zeros(norm.num_features, dtype=torch.float64)
        self.values: tuple[int, Tensor, Tensor] = (0, zeros, zeros)
        self.hook = norm.register_forward_pre_hook(self.add)

    def add(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].transpose(0, 1).flatten(1)  # (channels, values)
        variance, mean = (part.cpu().double() for part in torch.var_mean(x, dim=1, correction=0))
        count, total, squares = self.values
        size = x.shape[1]
        self.values = (count + size, total + size * mean, squares + size * (variance + mean**2))


def batch_norms(model: nn.Module) -> list[Any]:
    """Return the batch norms that keep statistics, except those of a frozen copy of the pretrained image tower."""
    copies = [part for part in model.modules() if isinstance(part, FrozenClipBackbone)]
    frozen = {id(part) for copy in copies for part in copy.modules()}
    return [
        part
        for part in model.modules()
        if isinstance(part, _BatchNorm) and part.track_running_stats and id(part) not in frozen
    ]


def _look(model: Any, videos: VideoBatch) -> None:
    """Run the parts of a retriever that have batch norms over the frames of videos."""
    backbone = None if model.selector is None else model.selector.backbone
    if isinstance(backbone, CnnBackbone):
        backbone(videos.policy_frames, videos.frame_mask, model.logit_scale().dtype)
    if batch_norms(model.clip):
        model.encode_video(videos)
