"""How much each chosen frame counts in a video's vector, and where in the video those frames are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaclip_finetune.model.aggregator import MlpAggregator, SumAggregator, TransformerAggregator
from adaclip_finetune.model.retriever import VideoEmbedding, VideoRetriever


class Weighed(NamedTuple):
    """The frames of one video, from 0, in the order of time, their weights (sum 1), and the place among them of the one
    that weighs most."""

    frames: list[int]
    weights: list[float]
    best: int


def weighed_frames(model: VideoRetriever, embedding: VideoEmbedding, frame_indices: Tensor) -> list[Weighed]:
    """For each video of an embedded batch; frame_indices (B, N) are the places in the video of all frames that were
    read, -1 for a blank one."""
    weights, preferred, indices = _weights(model, embedding).cpu(), None, frame_indices.cpu()
    if embedding.selection is not None:
        chosen = embedding.selection.indices.cpu()
        preferred = embedding.selection.logits.cpu().gather(1, chosen)
        indices = indices.gather(1, chosen)
    preferred = weights if preferred is None else preferred
    return [_weighed(*row) for row in zip(indices.tolist(), weights.tolist(), preferred.tolist(), strict=True)]


def _weights(model: VideoRetriever, embedding: VideoEmbedding) -> Tensor:
    """(B, K), rows of sum 1: of the softmax where there is one, of the selector's scores with `reuse_scores`."""
    frames, aggregator = embedding.frames, model.aggregator
    weights = torch.full(frames.shape[:2], 1 / frames.shape[1], device=frames.device)
    if isinstance(aggregator, MlpAggregator | TransformerAggregator):
        seen = aggregator.transformer(frames) if isinstance(aggregator, TransformerAggregator) else frames
        weights = aggregator.scorer(seen).squeeze(-1).float().div(aggregator.temperature).softmax(dim=1)
    mean = not isinstance(aggregator, MlpAggregator | TransformerAggregator | SumAggregator)
    if model.reuse_scores and embedding.selection is not None and not mean:  # the mean is of normalised frames
        scores = embedding.selection.logits.gather(1, embedding.selection.indices)
        weights = weights * (scores.float() / model.frame_temperature).softmax(dim=1)
    return weights / weights.sum(dim=1, keepdim=True)


def _weighed(indices: list[int], weights: list[float], preferred: list[float]) -> Weighed:
    """A short video's frames stand in it several times, and count together; among equals, the selector's first."""
    together: dict[int, tuple[float, float]] = {}
    for index, weight, score in zip(indices, weights, preferred, strict=True):
        if index >= 0:
            so_far, highest = together.get(index, (0.0, float("-inf")))
            together[index] = (so_far + weight, max(highest, score))
    frames = sorted(together)
    total = sum(weight for weight, _ in together.values()) or 1.0
    best = max(range(len(frames)), key=lambda place: (round(together[frames[place]][0], 6), together[frames[place]][1]))
    return Weighed(frames, [together[frame][0] / total for frame in frames], best)
