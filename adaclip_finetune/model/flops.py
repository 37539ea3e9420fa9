"""GFLOPs of each part, as multiply-adds, counted and not looked up.

The field's figures (ViT-B/32's image tower: 4.36) are the multiply-adds with weights: linear layers and convolutions.
The products of activations with activations inside attention (there 0.05) are no part of them; they are counted beside.

PyTorch's counter watches a forward pass of a copy on the meta device: shapes alone, no memory, no arithmetic.
Attention's fast path, which it would not see, is not taken there; LSTMs, of which it sees nothing, go by formula.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, fields
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adaclip_finetune.data.preprocess import IMAGENET
from adaclip_finetune.model.clip import embedding_width
from adaclip_finetune.model.frame_features import Backbone, CnnBackbone, FrozenClipBackbone
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.model.selector import RecurrentEncoder

_WITH_WEIGHTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution}


@dataclass(frozen=True)
class Gflops:
    """10⁹ multiply-adds. `clip_frame` and `policy_frame` are for one frame, the others for one video.

    `video` sums a video's way, N candidates and K chosen; `video_attention` is what the products inside attention add.
    """

    clip_frame: float
    policy_frame: float
    temporal_encoder: float
    scorer: float
    header_and_aggregator: float
    video: float
    video_attention: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers by name."""
        return asdict(self)


def count_gflops(model: VideoRetriever, num_frm: int) -> Gflops:
    """Count a video's way through the model in evaluation: all N frames through the policy, K through CLIP."""
    size, selector = model.image_spec.size, model.selector
    visual, width = model.clip.get_submodule("visual"), embedding_width(model.clip)
    frame = _count(visual, 1, 3, size, size)
    policy_frame = encoder = scorer = _Count()
    if selector is not None:
        policy_frame = _count_policy(selector.backbone, size)
        feature_dim = selector.backbone.feature_dim if selector.backbone else width
        encoder = _count_encoder(selector.encoder, num_frm, feature_dim)
        scorer = _count(selector.scorer, 1, num_frm, next(selector.scorer.parameters()).shape[1])
    tail = _Count()
    # A query-dependent aggregator costs nothing until a query comes.
    for part in (model.header, None if model.aggregator.query_dependent else model.aggregator):
        if part is not None:
            tail += _count(part, 1, model.top_k, width)
    # The policy `clip` looks at all N frame embeddings, and so needs them.
    encoded = num_frm if selector is not None and selector.backbone is None else model.top_k
    video = frame * encoded + policy_frame * num_frm + encoder + scorer + tail
    return Gflops(
        clip_frame=frame.with_weights / 1e9,
        policy_frame=policy_frame.with_weights / 1e9,
        temporal_encoder=encoder.with_weights / 1e9,
        scorer=scorer.with_weights / 1e9,
        header_and_aggregator=tail.with_weights / 1e9,
        video=video.with_weights / 1e9,
        video_attention=video.in_attention / 1e9,
    )


@dataclass(frozen=True)
class _Count:
    """Multiply-adds: with weights, and of activations with activations."""

    with_weights: float = 0.0
    in_attention: float = 0.0

    def __add__(self, other: _Count) -> _Count:
        return _Count(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int) -> _Count:
        return _Count(*(getattr(self, f.name) * times for f in fields(self)))


def _meta_copy(module: nn.Module) -> nn.Module:
    """The same module, frozen, with all its tensors on the meta device: a copy that costs no memory. float32."""
    memo: dict[int, Tensor] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo).float()


def _count_policy(backbone: Backbone | None, clip_size: int) -> _Count:
    if isinstance(backbone, CnnBackbone):
        return _count(backbone.cnn, 1, 3, IMAGENET.size, IMAGENET.size)
    if isinstance(backbone, FrozenClipBackbone):
        return _count(backbone.visual, 1, 3, clip_size, clip_size)
    return _Count()


def _count_encoder(encoder: nn.Module | None, num_frm: int, feature_dim: int) -> _Count:
    if encoder is None:
        return _Count()
    if isinstance(encoder, RecurrentEncoder):
        hidden = encoder.rnn.hidden_size
        return _Count(encoder.directions * num_frm * 4 * hidden * (feature_dim + hidden))
    return _count(encoder, 1, num_frm, feature_dim)


def _count(module: nn.Module, *shape: int) -> _Count:
    """The multiply-adds of the module in evaluation for an input of this shape."""
    on_meta = _meta_copy(module).eval()
    with FlopCounterMode(display=False) as counter:
        on_meta(torch.empty(*shape, device="meta"))
    # The counter counts a multiply-add as two operations.
    by_operation = counter.get_flop_counts().get("Global", {})
    with_weights = sum(count for operation, count in by_operation.items() if operation in _WITH_WEIGHTS) / 2
    return _Count(with_weights, counter.get_total_flops() / 2 - with_weights)
