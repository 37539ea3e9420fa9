"""Attention with frozen weights, as fast as attention that learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def speed_up_frozen_attention(module: nn.Module) -> None:
    """Make every `nn.MultiheadAttention` of `module` lay its input out in memory in the order in which it computes.

    With `batch_first` it transposes its input, (n, L, W). PyTorch multiplies a transposed tensor by a frozen weight in
    L small products, each with its copy of the weight, forward and backward; a weight that learns takes one product.
    Outputs and gradients stay the same.
    """
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention) and part.batch_first:
            part.register_forward_pre_hook(_lay_out)


def _lay_out(attention: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return the arguments of self-attention with the tokens (n, L, W) in the memory layout of (L, n, W)."""
    query, key, value, *others = arguments
    if not (query is key is value) or not torch.is_grad_enabled():
        return None
    tokens = query.transpose(0, 1).contiguous().transpose(0, 1)
    return (tokens, tokens, tokens, *others)
