"""CLIP transformer blocks outside the towers, and the initialisation of new layers."""

from __future__ import annotations

from collections.abc import Sequence

from open_clip.transformer import QuickGELU, Transformer
from torch import Tensor, nn

from adaclip_finetune.weights.plain import plain_copy

_HEAD_WIDTH = 64


def clip_blocks(width: int, layers: int, layer_norm_eps: float = 1e-5) -> Transformer:
    """Return pre-norm CLIP blocks with quick-GELU and OpenAI's parameter names: (B, L, width) → (B, L, width)."""
    blocks = Transformer(width=width, layers=layers, heads=heads_for(width), act_layer=QuickGELU)
    for module in blocks.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = layer_norm_eps
    return blocks


def heads_for(width: int) -> int:
    """Return the number of attention heads: width / 64 as in CLIP, or the next smaller divisor of the width."""
    return next(heads for heads in range(max(width // _HEAD_WIDTH, 1), 0, -1) if width % heads == 0)


def start_small(module: nn.Module) -> None:
    """Initialise the weights of Linear and Embedding modules from N(0, 0.02), and biases as 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def start_from(blocks: Transformer, pretrained: Sequence[nn.Module]) -> None:
    """Copy pretrained blocks into new ones, one by one, if their shapes are equal."""
    for own, other in zip(blocks.resblocks, pretrained, strict=False):
        state = plain_copy(other).state_dict()  # without what a finetuning method added
        if {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in own.state_dict().items()}:
            own.load_state_dict(state)


def padding_mask(is_token: Tensor, heads: int) -> Tensor:
    """Return the additive attention mask (T * heads, L, L) that hides positions where `is_token` (T, L) is False."""
    length = is_token.shape[1]
    hidden = ~is_token[:, None, :].expand(-1, length, -1).repeat_interleave(heads, dim=0)
    return hidden.float().masked_fill(hidden, float("-inf"))
