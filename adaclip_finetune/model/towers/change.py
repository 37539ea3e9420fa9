"""`tower: change`: the mean of the frames' vectors, and a learned map of how they change from the first to the last.

    v = mean_t u_t + Σ_j W_j Σ_t cos(π j (t + ½) / T) u_t

u_t is the unit vector of frame t. Played backwards, a video has the same mean, and for odd j the opposite sums, so that
the direction of time is a direction in the embedding space. A temporal embedding that is added to the input of a
transformer has to be found through all of its blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaclip_finetune.config.choices.towers import ChangeSettings
from adaclip_finetune.model.clip import embedding_width
from adaclip_finetune.model.towers.base import FramewiseTower


class Change(FramewiseTower):
    """Encodes the frames (B, T, 3, S, S) of each video to one token: (B, 1, D).

    Parameter: `maps` (frequencies, D, D), one W_j each. They are 0 at first, so that the video's vector is the mean of
    its frames. Frames that are not real take no part.
    """

    def __init__(self, settings: ChangeSettings, clip: nn.Module) -> None:
        super().__init__(settings, clip)
        width = embedding_width(clip)
        self.maps = nn.Parameter(torch.zeros(settings.frequencies, width, width))

    def combine(self, frames: Tensor, mask: Tensor) -> Tensor:
        real = mask | ~mask.any(dim=1, keepdim=True)  # a blank video consists of its blank frames
        frames = F.normalize(frames, dim=-1)
        shares = real.to(frames.dtype) / real.sum(dim=1, keepdim=True)
        mean = (shares[..., None] * frames).sum(dim=1)
        waves = cosines(real, len(self.maps), frames.dtype)
        changes = (waves[..., None] * frames[:, None]).sum(dim=2)  # (B, frequencies, D)
        return (mean + torch.einsum("bjd,jed->be", changes, self.maps))[:, None]

    def frame_shares(self, frames: int) -> Tensor:
        return torch.full((1, frames), 1 / frames)


def cosines(real: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return cos(π j (t + ½) / T) for j from 1 to `count`, (B, count, frames), and 0 for other frames.

    t numbers the T frames that are True in `real`, bool (B, frames). The wave j has a sum of 0 over them if j < T; with
    fewer frames it is 0.
    """
    place = real.cumsum(dim=1).to(dtype) - 0.5  # t + ½
    total = real.sum(dim=1, keepdim=True)
    j = torch.arange(1, count + 1, device=real.device)[:, None]
    waves = torch.cos((place * math.pi / total)[:, None] * j)
    return waves * (real[:, None] & (j < total[:, :, None]))
