"""LoRA compared with its formula; test_peft_contract.py has what every method promises."""

from functools import partial

import pytest
import torch
from conftest import build_tiny_clip
from pydantic import ValidationError
from tiny import VOCABULARY, on_meta
from torch import nn

from adaclip_finetune.config.choices.peft import LoraSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.peft.freezing import apply_freezing
from adaclip_finetune.peft.lora import Lora, LowRank
from adaclip_finetune.weights.plain import plain_copy, plain_name, plain_state

build_clip = partial(build_tiny_clip, vocabulary=VOCABULARY)


class Model(nn.Module):
    """A model with CLIP inside, as a method gets it."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = build_clip()


def attached(settings: LoraSettings) -> Model:
    model, method = Model(), Lora(settings)
    method.attach(model.clip)
    apply_freezing(model.clip, -1, False)
    method.choose(model)
    return model.eval()


def disturbed(model: Model) -> Model:
    """Change the learning parameters, as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(("alpha", "rslora", "scale"), [(None, False, 2.0), (3.0, False, 1.5), (3.0, True, 3 / 2**0.5)])
def test_the_weight_is_w_plus_scale_times_b_a(alpha: float | None, rslora: bool, scale: float) -> None:
    model = attached(LoraSettings(rank=2, alpha=alpha, rslora=rslora, targets=("fc",)))
    disturbed(model)
    layer = model.clip.visual.transformer.resblocks[1].mlp.c_fc
    update = layer.parametrizations.weight[0]
    original = layer.parametrizations.weight.original
    torch.testing.assert_close(layer.weight, original + scale * update.up[0] @ update.down[0])
    torch.testing.assert_close(original, build_clip().visual.transformer.resblocks[1].mlp.c_fc.weight)


def test_dora_learns_length_and_direction_separately() -> None:
    model = attached(LoraSettings(rank=2, dora=True, targets=("proj",)))
    disturbed(model)
    layer = model.clip.transformer.resblocks[0].mlp.c_proj
    update = layer.parametrizations.weight[0]
    torch.testing.assert_close(layer.weight.norm(dim=1), update.magnitude[0].abs())
    direction = layer.parametrizations.weight.original + 2.0 * update.up[0] @ update.down[0]
    cosine = nn.functional.cosine_similarity(layer.weight, direction, dim=1)
    torch.testing.assert_close(cosine.abs(), torch.ones(64))


def test_only_what_is_targeted_changes() -> None:
    """The target is q in the last block of the image tower, inside one fused weight of q, k and v."""
    model = attached(LoraSettings(rank=2, targets=("q",), towers="image", layers=(1,)))
    disturbed(model)
    changed = {
        name for name, tensor in plain_state(model).items() if not torch.equal(tensor, Model().state_dict()[name])
    }
    assert changed == {"clip.visual.transformer.resblocks.1.attn.in_proj_weight"}
    weight = model.clip.visual.transformer.resblocks[1].attn.in_proj_weight
    moved = (weight != build_clip().visual.transformer.resblocks[1].attn.in_proj_weight).any(dim=1)
    assert moved[:64].all() and not moved[64:].any()


def test_added_parameters_and_keywords_learn() -> None:
    model = attached(LoraSettings(rank=3, keep_module_keywords=("ln_final", "logit_scale")))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = {name for name in learning if plain_name(name) is not None}
    assert plain == {"clip.ln_final.weight", "clip.ln_final.bias", "clip.logit_scale"}
    # Per block and tower: q, k, v, out of 64 x 64; fc 256 x 64; proj 64 x 256.
    added = sum(p.numel() for name, p in model.named_parameters() if name in learning - plain)
    assert added == 2 * 2 * 3 * (4 * (64 + 64) + 2 * (64 + 256))


def test_dropout_drops_inputs_of_the_update_in_training_only() -> None:
    model = attached(LoraSettings(rank=2, targets=("fc",), dropout=0.5))
    disturbed(model)
    layer = model.clip.visual.transformer.resblocks[0].mlp.c_fc
    original = layer.parametrizations.weight.original
    still = layer.weight - original
    torch.testing.assert_close(layer.weight - original, still, rtol=0, atol=0)
    torch.manual_seed(0)
    dropped = layer.train().weight - original
    zero = (dropped == 0).all(dim=0)
    assert 16 <= int(zero.sum()) <= 48  # of 64 inputs
    torch.testing.assert_close(dropped[:, ~zero], 2 * still[:, ~zero])
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    for plain in (plain_state(model.clip), plain_copy(model.clip).state_dict()):
        torch.testing.assert_close(plain[name], original + still, rtol=0, atol=0)  # what is saved has no dropout
    assert layer.parametrizations.weight[0].training


def test_a_repeated_target_counts_once_and_a_row_of_zeros_stays_zero() -> None:
    model = attached(LoraSettings(rank=2, targets=("q", "q")))
    once = attached(LoraSettings(rank=2, targets=("q",)))
    assert model.state_dict().keys() == once.state_dict().keys()
    weight = torch.zeros(4, 4)
    assert LowRank(weight, [(0, 4)], LoraSettings(rank=2, dora=True))(weight).equal(weight)


def test_a_missing_block_or_tower_is_refused() -> None:
    with pytest.raises(UserError, match=r"peft\.config\.layers names block 2"):
        Lora(LoraSettings(layers=(1, 2))).attach(build_clip())
    deeper = build_clip()
    deeper.transformer.resblocks.append(build_clip().transformer.resblocks[0])
    Lora(LoraSettings(layers=(2,))).attach(deeper)  # which one of the towers has
    assert not any(isinstance(module, LowRank) for module in deeper.visual.modules())
    resnet = on_meta("RN50")
    with pytest.raises(UserError, match=r"(?s)peft lora: .*peft\.config\.towers to text"):
        Lora(LoraSettings()).attach(resnet)
    Lora(LoraSettings(towers="text")).attach(resnet)
    assert any(isinstance(module, LowRank) for module in resnet.transformer.modules())
    with pytest.raises(ValidationError, match="targets"):
        LoraSettings(targets=("query",))
