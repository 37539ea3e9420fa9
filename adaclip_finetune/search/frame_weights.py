"""How much each chosen frame counts in a video's vector, and where in the video those frames are."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from adaclip_finetune.model.features import VideoFeatures


class Weighed(NamedTuple):
    """The frames of one video, from 0, in the order of time, their weights (sum 1), and the place among them of the one
    that weighs most."""

    frames: list[int]
    weights: list[float]
    best: int


def weighed_frames(features: VideoFeatures, frame_indices: Tensor) -> list[Weighed]:
    """For each video of an encoded batch; frame_indices (B, N) are the places in the video of all frames that were
    read, -1 for a blank one."""
    weights, indices, preferred = features.frame_weights.cpu(), frame_indices.cpu(), features.frame_weights.cpu()
    if features.selection is not None:
        # In the order chosen, so that among equals the selector's first is preferred.
        chosen = features.selection.indices.cpu()
        preferred = features.selection.logits.cpu()
        weights, indices, preferred = (values.gather(1, chosen) for values in (weights, indices, preferred))
    return [_weighed(*row) for row in zip(indices.tolist(), weights.tolist(), preferred.tolist(), strict=True)]


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
