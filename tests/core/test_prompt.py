"""Prompts compared with a forward pass in which they are inserted by hand."""

from typing import Any

import pytest
import torch
from conftest import build_tiny_clip
from test_vit import MODELS, assert_close, build, first, pixels, words
from tiny import VOCABULARY, on_meta, random_tokens

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.peft import PromptSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.header import SeqTransformerHeader
from adaclip_finetune.model.text import encode_sentences, encode_words, trim_padding
from adaclip_finetune.model.vit import vision_view
from adaclip_finetune.peft.prompt import Prompting


def prompted(clip: Any, **settings: Any) -> Any:
    Prompting(PromptSettings(**settings)).attach(clip)
    return clip


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_prompts_stand_behind_the_class_token_and_have_no_place_in_the_grid(name: str, depth: int) -> None:
    clip: Any = build(*MODELS[name])
    plain: Any = build(*MODELS[name])
    view = vision_view(plain)
    prompted(clip, depth=depth, num_visual_prompts=3)
    images, at = pixels(clip), view.prefix
    tokens = view.norm(view.place(images))
    places = torch.cat([torch.full((at + 3,), -1), torch.arange(view.grid[0] * view.grid[1])])
    for number, (block, opened) in enumerate(zip(view.blocks, vision_view(clip).blocks, strict=True)):
        if number < depth:
            own = opened.module.prompts.tokens.expand(2, -1, -1)
            tokens = torch.cat([tokens[:, :at], own, tokens[:, at + (3 if number else 0) :]], dim=1)
        tokens = block(tokens, positions=places)
    expected = view.pool(torch.cat([tokens[:, :at], tokens[:, at + 3 :]], dim=1))
    assert_close(first(clip.visual(images)), expected)
    texts = [first(model.encode_text(words(model))) for model in (clip, plain)]
    assert texts[0].shape == texts[1].shape and not torch.allclose(*texts)


@torch.no_grad()
def test_words_see_the_prompts_and_not_what_follows_them() -> None:
    clip = prompted(build_tiny_clip(vocabulary=VOCABULARY), num_visual_prompts=0, depth=2)
    ids = random_tokens(3)
    states = encode_words(clip, ids)[0]
    changed = ids.clone()
    changed[:, 2] = 7
    later = encode_words(clip, changed)[0]
    torch.testing.assert_close(later[:, :2], states[:, :2])
    assert not torch.allclose(later[:, 2:4], states[:, 2:4])
    plain = encode_words(build_tiny_clip(vocabulary=VOCABULARY), ids)[0]
    assert states.shape == plain.shape and not torch.allclose(states, plain, atol=1e-3)
    # The whole context may be used, and padding behind the end token has no effect.
    torch.testing.assert_close(encode_sentences(clip, trim_padding(clip, ids)), clip.encode_text(ids))


def test_a_header_starts_from_the_blocks_without_what_was_added() -> None:
    clip = prompted(build_tiny_clip(vocabulary=VOCABULARY))
    header = SeqTransformerHeader(64, 4, clip)
    torch.testing.assert_close(header.transformer.resblocks[0].ln_1.bias, clip.transformer.resblocks[0].ln_1.bias)
    torch.testing.assert_close(
        header.transformer.resblocks[1].mlp.c_fc.weight, clip.transformer.resblocks[1].mlp.c_fc.weight
    )


def test_what_cannot_be_prompted_is_refused() -> None:
    for given, fact in (
        ({"num_visual_prompts": 0, "num_text_prompts": 0}, r"num_visual_prompts"),
        ({"depth": 1}, r"freeze_layer_num 1"),
    ):
        with pytest.raises(UserError, match=fact):
            load_config(None, {"peft": {"method": "prompt", "config": given}, "freeze_layer_num": 1})
    with pytest.raises(UserError, match=r"peft\.config\.depth 3: the image tower has only 2 blocks"):
        prompted(build_tiny_clip(vocabulary=VOCABULARY), depth=3)
    with pytest.raises(UserError, match=r"(?s)peft prompt: .*num_visual_prompts to 0"):
        prompted(on_meta("RN50"))
