"""Layer norms in which only weight or bias learns: the same values and gradients as the fused form."""

import copy
from typing import Any

import pytest
import torch
from conftest import build_tiny_clip
from open_clip.transformer import LayerNorm, LayerNormFp32
from tiny import VOCABULARY, random_tokens
from torch import Tensor, nn

from adaclip_finetune.model.norms import norm_plus_bias, split_frozen_norms

KINDS = [nn.LayerNorm, LayerNorm, LayerNormFp32]


def norm_of(kind: type[nn.LayerNorm], weight_learns: bool) -> nn.LayerNorm:
    torch.manual_seed(0)
    norm = kind(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.weight.requires_grad_(weight_learns)
    norm.bias.requires_grad_(not weight_learns)
    return norm


@pytest.mark.parametrize("weight_learns", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_fused_norm(kind: type[nn.LayerNorm], weight_learns: bool) -> None:
    x = torch.randn(4, 3, 8, requires_grad=True)
    found: list[tuple[Tensor, ...]] = []
    for forward in (lambda norm: norm(x), lambda norm: norm_plus_bias(norm, x)):
        norm = norm_of(kind, weight_learns)
        out = forward(norm)
        learning = norm.weight if weight_learns else norm.bias
        found.append((out, *torch.autograd.grad(out.sin().sum(), (x, learning))))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_the_dtype_is_that_of_the_fused_norm(kind: type[nn.LayerNorm]) -> None:
    norm, x = norm_of(kind, False), torch.randn(2, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm_plus_bias(norm, x).dtype == norm(x).dtype


def test_every_norm_of_a_tower_is_replaced_without_changing_outputs() -> None:
    clip, plain = (build_tiny_clip(vocabulary=VOCABULARY) for _ in range(2))
    split_frozen_norms(clip)
    split_frozen_norms(clip)  # once more changes nothing
    norms = [module for module in clip.modules() if isinstance(module, nn.LayerNorm)]
    assert norms and all(isinstance(norm, LayerNorm) and type(norm) is not LayerNorm for norm in norms)
    assert clip.state_dict().keys() == plain.state_dict().keys()
    tokens = random_tokens(2)
    torch.testing.assert_close(clip.eval().encode_text(tokens), plain.eval().encode_text(tokens), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(clip).encode_text(tokens), plain.encode_text(tokens), rtol=0, atol=0)


def test_a_gradient_is_lost_with_many_rows_and_one_frozen_parameter() -> None:
    holder = nn.Sequential(norm_of(nn.LayerNorm, False))
    split_frozen_norms(holder)
    norm: Any = holder[0]
    many, few = torch.empty(65_536, 8), torch.empty(65_535, 8)
    assert norm.loses_a_gradient(many) and norm.loses_a_gradient(many.view(256, 256, 8))
    assert not norm.loses_a_gradient(few)
    with torch.no_grad():
        assert not norm.loses_a_gradient(many)
    norm.weight.requires_grad_(True)
    assert not norm.loses_a_gradient(many)
