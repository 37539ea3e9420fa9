"""BitFit, freezing and parameter counts, compared with independent oracles; test_peft_contract.py has every method."""

import copy
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import build_tiny_clip
from tiny import VOCABULARY, on_meta
from torch import nn

from adaclip_finetune.config import PEFT, BitFitSettings, FullSettings, IbsSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.peft import build_method, choose_what_learns, trainable_report
from adaclip_finetune.peft.freezing import apply_freezing

KEYWORDS = ("ln_post", "visual.proj", "ln_final", "text_projection", "logit_scale")


class TinyRetriever(nn.Module):
    """The tiny CLIP, a selector with a frozen copy of the image tower and a batch norm in it, and an aggregator."""

    def __init__(self, seed=0):
        super().__init__()
        self.clip = build_tiny_clip(seed, VOCABULARY)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.selector = nn.Module()
            self.selector.visual = copy.deepcopy(self.clip.visual).requires_grad_(False)
            self.selector.norm = nn.BatchNorm1d(64)
            self.aggregator = nn.Linear(64, 64)


def choose(model, settings, freeze_layer_num):
    """Let the method of these settings choose what learns in the model."""
    section = section_of(settings)
    config = SimpleNamespace(freeze_layer_num=freeze_layer_num, freeze_clip=False, peft=section, seed=0)
    method = build_method(config)
    method.attach(model.clip)
    choose_what_learns(method, model, config)


def section_of(settings):
    """Return the section `peft` of a config with these settings."""
    (name,) = (name for name, choice in PEFT.items() if choice.settings is type(settings))
    return SimpleNamespace(method=name, config=settings)


def learning_names(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


# ---- BitFit ----


@pytest.mark.parametrize("freeze_layer_num", [-1, 0, 1, 2])
@pytest.mark.parametrize("include_qkv_bias", [False, True])
@pytest.mark.parametrize("keywords", [(), KEYWORDS])
def test_bitfit_learns_the_parameters_of_its_definition(freeze_layer_num, include_qkv_bias, keywords):
    """The oracle goes by the modules of the towers, not by parameter names."""
    model = TinyRetriever()
    clip = model.clip
    expected = {clip.ln_final.bias, clip.visual.ln_post.bias}
    for tower in (clip.transformer, clip.visual.transformer):
        for block in tower.resblocks[max(freeze_layer_num, 0) :]:
            modules = (block.ln_1, block.ln_2, block.mlp.c_fc, block.mlp.c_proj, block.attn.out_proj)
            expected |= {module.bias for module in modules}
            if include_qkv_bias:
                expected.add(block.attn.in_proj_bias)
    if freeze_layer_num == -1:
        expected.add(clip.visual.ln_pre.bias)
    if keywords:
        expected |= {clip.ln_final.weight, clip.visual.ln_post.weight}
        expected |= {clip.visual.proj, clip.text_projection, clip.logit_scale}
    settings = BitFitSettings(keep_module_keywords=keywords, include_qkv_bias=include_qkv_bias)
    choose(model, settings, freeze_layer_num)
    assert {parameter for parameter in clip.parameters() if parameter.requires_grad} == expected


def test_a_keyword_that_matches_nothing_gives_a_warning(caplog):
    settings = BitFitSettings(keep_module_keywords=("ln_post", "text_projektion"))
    with caplog.at_level(logging.WARNING):
        choose(TinyRetriever(), settings, 0)
    assert "'text_projektion'" in caplog.text
    assert "ln_post" not in caplog.text


# ---- freeze_layer_num, freeze_clip ----


def test_freezing_of_the_tiny_clip():
    clip = build_tiny_clip(vocabulary=VOCABULARY)
    everything = {name for name, _ in clip.named_parameters()}
    head = {"logit_scale", "text_projection", "visual.proj"} | {
        f"{norm}.{kind}" for norm in ("ln_final", "visual.ln_post") for kind in ("weight", "bias")
    }
    apply_freezing(clip, -1, False)
    assert learning_names(clip) == everything
    apply_freezing(clip, 1, False)
    assert learning_names(clip) == head | {name for name in everything if ".resblocks.1." in name}
    apply_freezing(clip, 2, False)
    assert learning_names(clip) == head
    apply_freezing(clip, 1, True)
    assert learning_names(clip) == set()
    apply_freezing(clip, -1, False)
    assert learning_names(clip) == everything


def test_layers_that_the_towers_lack_are_refused():
    clip = build_tiny_clip(vocabulary=VOCABULARY)
    with pytest.raises(UserError, match=r"freeze_layer_num 3: the image tower has 2 blocks and the text tower 2"):
        apply_freezing(clip, 3, False)
    apply_freezing(clip, 3, True)  # has no effect with freeze_clip
    clip.visual.transformer = nn.Identity()
    with pytest.raises(UserError, match="visual tower of this CLIP has no numbered blocks"):
        apply_freezing(clip, 0, False)
    apply_freezing(clip, -1, False)


@pytest.mark.parametrize(
    ("name", "frozen", "head"),
    [
        (
            "ViT-B-16-SigLIP2",
            r"(visual\.trunk\.(pos_embed|patch_embed)|text\.(positional_embedding|token_embedding))(\.|$)",
            r"(logit_|visual\.trunk\.(norm|attn_pool)\.|text\.(ln_final|text_projection)\.)",
        ),
        (
            "RN50",
            r"(visual\.(conv|bn)\d\.|positional_embedding$|token_embedding)",
            r"(logit_scale|visual\.attnpool\.|text_projection|ln_final)",
        ),
    ],
)
def test_other_towers_are_frozen_likewise(name, frozen, head):
    clip = on_meta(name)
    everything = {name for name, _ in clip.named_parameters()}
    apply_freezing(clip, 0, False)
    assert everything - learning_names(clip) == {name for name in everything if re.match(frozen, name)}
    apply_freezing(clip, 12, False)
    assert learning_names(clip) == {name for name in everything if re.match(head, name)}


# ---- the published counts, and their report ----


@pytest.fixture(scope="module")
def vit_b_32():
    model = nn.Module()
    model.clip = on_meta("ViT-B-32-quickgelu")
    model.selector, model.aggregator = nn.Linear(3, 2), nn.Linear(2, 1)
    return model


@pytest.mark.parametrize(
    ("settings", "freeze_layer_num", "trainable"),
    [
        (FullSettings(), -1, 151_277_313),
        (FullSettings(), 0, 123_540_993),
        (FullSettings(towers="text"), -1, 151_277_313 - 87_849_216),
        (FullSettings(towers="image"), -1, 87_849_216 + 1),
        (BitFitSettings(keep_module_keywords=KEYWORDS), 0, 780_801),
        (BitFitSettings(keep_module_keywords=KEYWORDS), -1, 781_569),
        (BitFitSettings(keep_module_keywords=KEYWORDS, include_qkv_bias=True), 0, 780_801 + 46_080),
        (IbsSettings(), 0, 123_540_993),
    ],
)
def test_published_counts_of_vit_b_32(vit_b_32, settings, freeze_layer_num, trainable):
    choose(vit_b_32, settings, freeze_layer_num)
    report = trainable_report(vit_b_32)
    assert report.as_dict() == {
        "clip": {"trainable": trainable, "total": 151_277_313},
        "selector": {"trainable": 8, "total": 8},
        "aggregator": {"trainable": 3, "total": 3},
    }
    assert f"of   {151_277_313 + 11:,}" in str(report)


def test_the_report_counts_a_frozen_copy_in_the_selector_and_nothing_twice():
    model = TinyRetriever()
    model.aggregator.shared = model.clip.ln_final  # as a header that shares CLIP's own module would
    report = trainable_report(model)
    tower = sum(parameter.numel() for parameter in model.clip.visual.parameters())
    assert (report.selector.trainable, report.selector.total) == (128, 128 + tower)
    assert report.aggregator.total == 64 * 65
    assert report.all.total == sum(parameter.numel() for parameter in model.parameters())
