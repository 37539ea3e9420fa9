"""Attention with frozen weights: the same values, by one product instead of one a token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adaclip_finetune.model.attention import speed_up_frozen_attention


class Operations(TorchDispatchMode):
    """Records the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def attention(learns: bool) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(16, 2, batch_first=True).double().requires_grad_(learns)
    made.in_proj_bias.requires_grad_(True)
    return made


def results(module: nn.MultiheadAttention, mask: Tensor | None = None) -> tuple[list[str], list[Tensor]]:
    """Return the operations of a step, and its output with all gradients."""
    torch.manual_seed(1)
    tokens = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    with Operations() as operations:
        out = module(tokens, tokens, tokens, need_weights=False, attn_mask=mask)[0]
        (out * torch.randn_like(out)).sum().backward()
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return operations.names, [out, *(one.grad for one in (tokens, *learning) if one.grad is not None)]


@pytest.mark.parametrize("masked", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learning"])
def test_outputs_and_gradients_stay(learns: bool, masked: bool) -> None:
    module = attention(learns)
    faster = copy.deepcopy(module)
    speed_up_frozen_attention(faster)
    mask = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1) if masked else None
    (_, before), (_, after) = results(module, mask), results(faster, mask)
    assert len(before) == len(after) >= 3
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_frozen_projection_is_one_product() -> None:
    module = attention(learns=False)
    assert "bmm" in results(module)[0]  # one product a token: what the hook is for
    speed_up_frozen_attention(module)
    assert "bmm" not in results(module)[0]


def test_other_attention_gets_its_own_tokens() -> None:
    module = attention(learns=True)
    words, frames = torch.randn(2, 3, 4, 16, dtype=torch.float64)[:2]
    before = module(words, frames, frames)[0]
    speed_up_frozen_attention(module)
    torch.testing.assert_close(module(words, frames, frames)[0], before, rtol=0, atol=0)
