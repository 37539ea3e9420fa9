"""Views of a video: the same part of all its frames, drawn at random, and the choice of those that a model is sure of.

As published for the test-time adaptation of classifiers (TPT, Shu et al. 2022, "Test-Time Prompt Tuning for Zero-Shot
Generalization in Vision-Language Models"; RLCF, Zhao et al. 2024), whose videos are pictures, videos of one frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaclip_finetune.data.dataset import VideoBatch
from adaclip_finetune.data.preprocess import CropFlip, draw_crop_flip
from adaclip_finetune.model.hard_topk import Selection
from adaclip_finetune.model.retriever import VideoRetriever

_SMALLEST_PART = 0.08  # of the area of a frame

Chosen = tuple[VideoBatch, Selection | None]
"""The frames that a model chose of a video, and their selection; None without a selector."""


def draw_parts(count: int, random: np.random.Generator) -> list[CropFlip | None]:
    """Draw the parts of the frames that `count` views show. The first view is the video as it is: None."""
    return [None, *(draw_crop_flip(1000, 1000, random, _SMALLEST_PART) for _ in range(count - 1))]


@torch.no_grad()
def chosen_frames(model: VideoRetriever, video: VideoBatch) -> Chosen:
    """Return the frames that a model chooses of one video."""
    selection = model.encode_video(video).selection
    if selection is None:
        return video, None
    (indices,), count = selection.indices, selection.indices.shape[1]
    every = torch.arange(count, device=indices.device)
    weights = torch.eye(count, device=indices.device)
    frames, mask, places = (tensor[:, indices] for tensor in (video.frames, video.frame_mask, video.frame_indices))
    alone = replace(video, frames=frames, frame_mask=mask, frame_indices=places, policy_frames=None)
    return alone, Selection(weights[None], every[None], selection.logits[:, indices])


def viewed(chosen: Chosen, parts: Sequence[CropFlip | None]) -> Chosen:
    """Return the views of a video that show these parts of its frames, as so many videos."""
    video, selection = chosen
    count = len(parts)
    batch = VideoBatch(
        frames=torch.stack([_cut(video.frames[0], part) for part in parts]),
        frame_mask=video.frame_mask.expand(count, -1),
        policy_frames=None,
        frame_indices=video.frame_indices.expand(count, -1),
        video_ids=video.video_ids * count,
    )
    if selection is None:
        return batch, None
    return batch, Selection(*(tensor.expand(count, *tensor.shape[1:]) for tensor in selection))


def _cut(frames: Tensor, part: CropFlip | None) -> Tensor:
    """Return a part of frames, uint8 (n, 3, S, S), at the size of the frames."""
    if part is None:
        return frames
    size = frames.shape[-1]
    top, left = round(part.top * size), round(part.left * size)
    height, width = max(1, round(part.height * size)), max(1, round(part.width * size))
    cut = frames[..., top : top + height, left : left + width]
    cut = cut.flip(-1) if part.mirrored else cut
    resized = F.interpolate(cut.float(), (size, size), mode=part.interpolation, antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


def most_certain(logits: Tensor, share: float) -> Tensor:
    """Return which of the views with these logits (n, C) have the lowest entropies: int(n · share) of them, at least
    one, the most certain first."""
    entropies = torch.special.entr(logits.softmax(dim=1)).sum(dim=1)
    order: Tensor = entropies.argsort(stable=True)
    return order[: max(1, int(len(logits) * share))]
