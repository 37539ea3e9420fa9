"""GFLOPs of each part of the model, counted as multiply-adds.

Published figures (4.36 for ViT-B/32's image tower) are the multiply-adds with weights, in linear layers and
convolutions. The products of activations inside attention (0.05 there) are not included; they are counted separately.

PyTorch's counter watches a forward pass of a copy on the meta device, which has shapes but no values. The fast path of
attention, which the counter does not see, is not taken there; LSTMs, which it does not see either, are computed by
formula.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from adaclip_finetune.model.clip import embedding_width
from adaclip_finetune.model.frame_features import Backbone, CnnBackbone, FrozenClipBackbone
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.model.selector import RecurrentEncoder
from adaclip_finetune.model.towers.base import FramewiseTower

# Multiply-adds with weights, and of activations with activations inside attention.
_Counts = NDArray[np.float64]
_NOTHING: _Counts = np.zeros(2)
_WITH_WEIGHTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution}


@dataclass(frozen=True)
class Gflops:
    """Multiply-adds in 10⁹. `clip_frame` and `policy_frame` are for one frame, the others for one video.

    `video` is the sum for a video with N candidate and K selected frames; `video_attention` is what the products inside
    attention add to it.
    """

    clip_frame: float
    policy_frame: float
    temporal_encoder: float
    scorer: float
    header_and_aggregator: float
    video: float
    video_attention: float

    def as_dict(self) -> dict[str, float]:
        """Return the numbers by name."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"GFLOPs (multiply-adds): {self.video:.3g} a video; a frame: CLIP {self.clip_frame:.3g}, "
            f"policy {self.policy_frame:.3g}; all frames: temporal encoder {self.temporal_encoder:.3g}, "
            f"scorer {self.scorer:.3g}, aggregation {self.header_and_aggregator:.3g}; "
            f"products inside attention add {self.video_attention:.3g}"
        )


def count_gflops(model: VideoRetriever, num_frm: int) -> Gflops:
    """Count what a video costs in evaluation: all N frames go through the policy, K through CLIP."""
    on_meta = _meta_copy(model)
    assert isinstance(on_meta, VideoRetriever)
    size, selector, width = model.image_spec.size, on_meta.selector, embedding_width(model.clip)
    frame = _count(on_meta.clip.get_submodule("visual"), torch.empty(1, 3, size, size, device="meta"))
    policy_frame = encoder = scorer = _NOTHING
    if selector is not None:
        policy_frame = _count_policy(selector.backbone, size)
        feature_dim = selector.backbone.feature_dim if selector.backbone else width
        encoder = _count_encoder(selector.encoder, num_frm, feature_dim)
        scored = torch.empty(1, num_frm, next(selector.scorer.parameters()).shape[1], device="meta")
        scorer = _count(selector.scorer, scored)
    # The policy `clip` scores the embeddings of all N frames.
    looks_at_all = selector is not None and selector.backbone is None
    pixels = torch.empty(1, model.top_k, 3, size, size, device="meta")
    encoded = _count(on_meta.tower, pixels, torch.ones(1, model.top_k, dtype=torch.bool, device="meta"))
    if looks_at_all:  # the tower then needs no frame once more if it takes CLIP's vectors of frames
        framewise = isinstance(model.tower, FramewiseTower)
        encoded = encoded + frame * (num_frm - model.top_k if framewise else num_frm)
    shares = model.tower.frame_shares(model.top_k)
    pooled = torch.empty(1, model.top_k if shares is None else len(shares), width, device="meta")
    tail = sum((_count(part, pooled) for part in (on_meta.header, on_meta.aggregator) if part is not None), _NOTHING)
    video = encoded + policy_frame * num_frm + encoder + scorer + tail
    in_order_of_fields = [part[0] for part in (frame, policy_frame, encoder, scorer, tail, video)] + [video[1]]
    return Gflops(*(float(count) / 1e9 for count in in_order_of_fields))


def _meta_copy(module: nn.Module) -> nn.Module:
    """Return a float32 copy of the module on the meta device, which takes no memory.

    Parametrizations are left out, because they are merged before a model is used. All parameters learn: torch then
    multiplies a batch by a weight as one matrix, and not as a product of batches, which would count as one of
    activations.
    """
    memo: dict[int, Tensor] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, empty.is_floating_point()) if isinstance(tensor, nn.Parameter) else empty
    on_meta = copy.deepcopy(module, memo).float().eval()
    for part in on_meta.modules():
        if isinstance(part, ParametrizationList):
            part.forward = partial(getattr, part, "original")  # type: ignore[method-assign]
    return on_meta


def _count_policy(backbone: Backbone | None, clip_size: int) -> _Counts:
    if isinstance(backbone, CnnBackbone):
        return _count(backbone.cnn, torch.empty(1, 3, backbone.view.size, backbone.view.size, device="meta"))
    if isinstance(backbone, FrozenClipBackbone):
        return _count(backbone.visual, torch.empty(1, 3, clip_size, clip_size, device="meta"))
    return _NOTHING


def _count_encoder(encoder: nn.Module | None, num_frm: int, feature_dim: int) -> _Counts:
    if encoder is None:
        return _NOTHING
    if isinstance(encoder, RecurrentEncoder):
        hidden = encoder.rnn.hidden_size
        return np.array([encoder.directions * num_frm * 4 * hidden * (feature_dim + hidden), 0.0])
    return _count(encoder, torch.empty(1, num_frm, feature_dim, device="meta"))


def _count(module: nn.Module, *inputs: Tensor) -> _Counts:
    """Return the multiply-adds of a module on the meta device for these inputs."""
    from torch.utils.flop_counter import FlopCounterMode  # imports a compiler, which most commands do not need

    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    # The counter counts a multiply-add as two operations.
    by_operation = counter.get_flop_counts().get("Global", {})
    with_weights = sum(count for operation, count in by_operation.items() if operation in _WITH_WEIGHTS) / 2
    return np.array([with_weights, counter.get_total_flops() / 2 - with_weights])
