"""`tower: proxy_tokens`: frames meet in a few proxy tokens, which attend to all frames (CLIP-ViP, Xue et al. 2023).

    [proxies | patches of frame 0 | patches of frame 1 | …]

In every block the proxies attend to all tokens, and the patches of a frame to the proxies and to their own frame. The
class token is the first proxy, and the video's vector is what becomes of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaclip_finetune.config.choices.towers import ProxyTokensSettings
from adaclip_finetune.model.towers.base import BlockwiseTower
from adaclip_finetune.model.vit import OpenBlock

_NOISE = 0.1  # of copies of the class token: without it they would stay equal to each other


class ProxyTokens(BlockwiseTower):
    """Encodes the frames (B, T, 3, S, S) of each video to one token: (B, 1, D).

    Parameters: `proxies` (num_proxies − 1, W), without their position embedding, which is the class token's; and
    `temporal_embedding` (temporal_size, W), which is added to the patches. Either is None if the settings leave it out.

    Registers of the image tower are proxies too. In an image tower without a class token, its pooling, which reads all
    frames at the end, stands for the first proxy, and all proxies among the tokens are new. With one proxy, one frame
    and no temporal embedding, every tower therefore gives CLIP's own embedding.
    """

    def __init__(self, settings: ProxyTokensSettings, clip: nn.Module) -> None:
        super().__init__(settings, clip)
        added, width = settings.num_proxies - 1, self.view.width
        self.proxies = nn.Parameter(self._initial(added)) if added else None
        self.temporal_embedding = (
            nn.Parameter(torch.zeros(settings.temporal_size, width)) if settings.temporal_embedding else None
        )
        self._shared = self.view.prefix + added  # tokens that stand before the patches of all frames

    def enter(self, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        """Return normalised tokens (B, S, W): the proxies, then the patches of frame after frame."""
        mask, prefix = state["mask"], self.view.prefix
        state["real"] = real = mask | ~mask.any(dim=1, keepdim=True)  # a blank video consists of its blank frames
        patches = tokens[:, :, prefix:]
        if self.temporal_embedding is not None:
            patches = patches + temporal_rows(self.temporal_embedding, real)[:, :, None].to(tokens.dtype)
        shared = [tokens[:, 0, :prefix]]  # these are the same for every frame
        if self.proxies is not None:
            own = self.view.class_token()
            placed = self.proxies if own is None else self.proxies + own[1]
            shared.append(placed.to(tokens.dtype).expand(len(tokens), -1, -1))
        per_frame = patches.shape[2]
        places = torch.arange(per_frame, device=tokens.device).repeat(patches.shape[1])
        state["positions"] = F.pad(places, (self._shared, 0), value=-1)
        return self.view.norm(torch.cat([*shared, patches.flatten(1, 2)], dim=1))

    def block(self, number: int, block: OpenBlock, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        q, k, v = block.qkv(tokens, state["positions"])
        tokens = tokens + block.attention_out(proxy_attention(q, k, v, self._shared, state["real"]))
        return tokens + block.mlp(tokens)

    def leave(self, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        """Pool each frame's patches and the class token as CLIP does, and return the mean over real frames (B, 1, D).

        Where CLIP takes the class token alone, this is the class token of the video.
        """
        real: Tensor = state["real"]
        frames = tokens[:, self._shared :].reshape(*real.shape, -1, tokens.shape[2])
        own = tokens[:, None, : self.view.prefix].expand(-1, real.shape[1], -1, -1)
        pooled = self.view.pool(torch.cat([own, frames], dim=2).flatten(0, 1)).reshape(*real.shape, -1)
        shares = real.to(pooled.dtype) / real.sum(dim=1, keepdim=True)
        return (shares[..., None] * pooled).sum(dim=1, keepdim=True)

    def frame_shares(self, frames: int) -> Tensor:
        return torch.full((1, frames), 1 / frames)

    @torch.no_grad()
    def _initial(self, count: int) -> Tensor:
        """Return values of new proxies, (count, W)."""
        values = torch.randn(count, self.view.width)
        if self.settings.proxy_init == "published":
            return values
        own = self.view.class_token()
        if own is None:  # the scale of CLIP's class token before training
            return values / math.sqrt(self.view.width)
        token = own[0].to(values)
        return token + _NOISE * token.std() * values


def temporal_rows(embedding: Tensor, real: Tensor) -> Tensor:
    """Return the row of a temporal embedding (size, W) for each frame of `real`, bool (B, T): (B, T, W).

    The embedding is interpolated linearly to the number of frames that are True in each video, so that they span the
    video evenly whatever is between them. Rows of other frames have no meaning.
    """
    size = len(embedding)
    number = (real.cumsum(dim=1) - 1).to(embedding.dtype)
    source = ((number + 0.5) * size / real.sum(dim=1, keepdim=True) - 0.5).clamp(0, size - 1)
    rows = torch.arange(size, device=real.device, dtype=embedding.dtype)
    weights: Tensor = (1 - (source[..., None] - rows).abs()).clamp(min=0)
    return weights @ embedding


def proxy_attention(q: Tensor, k: Tensor, v: Tensor, shared: int, real: Tensor) -> Tensor:
    """Return attended values (B, heads, S, d) of q, k and v of that shape: `shared` proxies, then the frames' patches.

    The proxies attend to themselves and to the frames that are True in `real` (B, T). The patches of a frame attend to
    the proxies and to their own frame. These two parts take about S · (2 · shared + S / T) products instead of S².
    """
    frames = real.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, S, heads, d)
    own_q = q[:, shared:].reshape(len(q) * frames, -1, *q.shape[2:])
    own_k, own_v = (_by_frame(x, shared, frames) for x in (k, v))  # (B, T, proxies and patches, heads, d)
    patches = _attend(own_q, own_k.flatten(0, 1), own_v.flatten(0, 1)).reshape(len(q), -1, *q.shape[2:])
    if not shared:
        return patches.transpose(1, 2)
    seen = real[:, :, None].repeat(1, 1, own_k.shape[2])
    seen[:, :, :shared] = False  # each frame has a copy of the proxies, of which the first is enough
    seen[:, 0, :shared] = True
    # A copy of q, because a slice would keep the q, k and v of all tokens in memory for the backward pass.
    proxies = _attend(q[:, :shared].clone(), own_k.flatten(1, 2), own_v.flatten(1, 2), seen.flatten(1)[:, None, None])
    return torch.cat([proxies, patches], dim=1).transpose(1, 2)


def _by_frame(x: Tensor, shared: int, frames: int) -> Tensor:
    """Return the shared tokens and each frame's own, (B, T, shared + L, …), of tokens (B, shared + T · L, …)."""
    every = x[:, None, :shared].expand(-1, frames, *x[:, :shared].shape[1:])
    return torch.cat([every, x[:, shared:].reshape(len(x), frames, -1, *x.shape[2:])], dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return attended values (n, L, heads, d) of q of that shape, and k and v (n, M, heads, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
