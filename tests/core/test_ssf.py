"""SSF compared with its definition: γ·y + β behind a layer."""

from typing import Any

import pytest
import torch
from conftest import build_tiny_clip
from tiny import VOCABULARY, on_meta
from torch import nn

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.peft import SsfSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.norms import split_frozen_norms
from adaclip_finetune.peft.ssf import Scale, ScaleAndShift, Shift
from adaclip_finetune.weights.plain import plain_copy


def attached(**settings: Any) -> Any:
    clip = build_tiny_clip(vocabulary=VOCABULARY)
    ScaleAndShift(SsfSettings(**settings)).attach(clip)
    with torch.no_grad():
        for module in clip.modules():
            if isinstance(module, Scale | Shift):
                for parameter in module.parameters():
                    parameter += torch.randn_like(parameter)
    return clip


def places(clip: nn.Module) -> set[str]:
    """Return the modules that are scaled."""
    return {name.split(".parametrizations")[0] for name, module in clip.named_modules() if isinstance(module, Scale)}


@pytest.mark.parametrize("path", ["mlp.c_fc", "attn.out_proj", "ln_2"])
def test_the_output_of_a_layer_is_scaled_then_shifted(path: str) -> None:
    clip, plain = attached(), build_tiny_clip(vocabulary=VOCABULARY)
    own, layer = (model.visual.transformer.resblocks[1].get_submodule(path) for model in (clip, plain))
    gamma = 1 + own.parametrizations.weight[0].scale
    x = torch.randn(5, layer.weight.shape[-1])
    torch.testing.assert_close(own(x), gamma * layer(x) + own.parametrizations.bias[0].shift)


def test_patches_of_a_tower_without_their_bias_are_only_scaled() -> None:
    own, layer = attached().visual.conv1, build_tiny_clip(vocabulary=VOCABULARY).visual.conv1
    x = torch.randn(1, 3, 32, 32)
    gamma = 1 + own.parametrizations.weight[0].scale
    torch.testing.assert_close(own(x), gamma[:, None, None] * layer(x))


def test_inside_a_fused_projection_only_the_named_rows_change() -> None:
    clip, plain = attached(where=("v",)), build_tiny_clip(vocabulary=VOCABULARY)
    own, layer = (model.transformer.resblocks[0].attn for model in (clip, plain))
    for name in ("in_proj_weight", "in_proj_bias"):
        moved = (getattr(own, name) != getattr(layer, name)).reshape(192, -1).any(dim=1)
        assert moved[128:].all() and not moved[:128].any()


def test_a_plain_copy_has_the_classes_of_the_pretrained_tower() -> None:
    clip = attached()
    split_frozen_norms(clip)
    copied = plain_copy(clip)
    for name, part in build_tiny_clip(vocabulary=VOCABULARY).named_modules():
        assert isinstance(copied.get_submodule(name), type(part)), name


@pytest.mark.parametrize(
    ("settings", "inside", "outside"),
    [
        ({}, {"visual.conv1", "visual.ln_pre", "visual.ln_post", "ln_final"}, set()),
        ({"towers": "text"}, {"ln_final", "transformer.resblocks.0.mlp.c_fc"}, {"visual.conv1", "visual.ln_post"}),
        ({"layers": (1,)}, {"visual.transformer.resblocks.1.ln_1"}, {"visual.conv1", "ln_final", "visual.ln_pre"}),
        ({"where": ("norm",)}, {"visual.ln_pre"}, {"visual.conv1", "transformer.resblocks.0.mlp.c_fc"}),
    ],
)
def test_settings_say_which_layers_are_scaled(settings: dict[str, Any], inside: set[str], outside: set[str]) -> None:
    found = places(attached(**settings))
    assert inside <= found and not outside & found


def test_what_cannot_be_scaled_is_refused() -> None:
    with pytest.raises(UserError, match=r"peft\.config\.where .*peft\.config\.towers"):
        load_config(None, {"peft": {"method": "ssf", "config": {"where": ["patch"], "towers": "text"}}})
    with pytest.raises(UserError, match=r"(?s)peft ssf: .*peft\.config\.towers to text"):
        ScaleAndShift(SsfSettings()).attach(on_meta("RN50"))
