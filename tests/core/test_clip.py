"""CLIP's towers give what transformers' CLIP gives, and leaving out padding does not change the result."""

from typing import Any

import open_clip
import pytest
import torch
from conftest import build_tiny_clip
from torch import nn
from transformers import CLIPConfig, CLIPModel

from adaclip_finetune.errors import UserError
from adaclip_finetune.model.clip import embedding_width, encode_images, text_blocks, text_positions
from adaclip_finetune.model.text import ClipTextTower, check_words, encode_sentences, encode_words, trim_padding
from adaclip_finetune.weights.huggingface import to_openai_names
from adaclip_finetune.weights.loaded import pools_at_end_token, text_tower

WIDTH = 40
VISION = {"image_size": 48, "patch_size": 16, "width": 64, "layers": 3, "head_width": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2}
END = 49407
IDS = open_clip.tokenize(["a red square", "two small blue circles meet, then one of them leaves", "it", "stars"], 20)


def random_weights(module: nn.Module, seed: int = 0) -> None:
    """Draw weights that are larger than initial ones, so that every part of the model shows in the result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_gain else 0.1 * noise)


@pytest.fixture(params=[True, False], ids=["quick_gelu", "gelu"])
def pair(request: pytest.FixtureRequest) -> tuple[CLIPModel, open_clip.CLIP]:
    """Return transformers' CLIP and open_clip's with the same random weights."""
    activation: dict[str, Any] = {"hidden_act": "quick_gelu" if request.param else "gelu"}
    text = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    text |= {"max_position_embeddings": 20, "vocab_size": 49408, "eos_token_id": END, **activation}
    vision |= {"image_size": 48, "patch_size": 16, **activation}
    theirs = CLIPModel(CLIPConfig(projection_dim=WIDTH, text_config=text, vision_config=vision)).eval()
    random_weights(theirs)
    ours = open_clip.CLIP(WIDTH, VISION, TEXT, quick_gelu=request.param).eval()
    ours.load_state_dict(to_openai_names(theirs.state_dict()))
    return theirs, ours


@torch.no_grad()
def test_towers_equal_those_of_transformers(pair: tuple[CLIPModel, open_clip.CLIP]) -> None:
    theirs, ours = pair
    pixels = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    images = theirs.visual_projection(theirs.vision_model(pixels).pooler_output)
    torch.testing.assert_close(encode_images(ours, pixels), images, atol=1e-5, rtol=1e-5)
    sentences = theirs.text_projection(theirs.text_model(IDS).pooler_output)
    assert sentences.std() > 0.1 and images.std() > 0.1
    for ids in (IDS, trim_padding(ours, IDS)):
        torch.testing.assert_close(encode_sentences(ours, ids), sentences, atol=1e-5, rtol=1e-5)
    words, is_word = encode_words(ours, ids)
    expected = theirs.text_projection(theirs.text_model(IDS).last_hidden_state)[:, : ids.shape[1]]
    torch.testing.assert_close(words, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(is_word, ids != 0)


def custom(text: dict[str, Any], **vision: Any) -> open_clip.CustomTextCLIP:
    clip = open_clip.CustomTextCLIP(WIDTH, {**VISION, **vision}, {**TEXT, **text})
    random_weights(clip)
    return clip.double().eval()


CAUSAL = {
    "CLIP": lambda: build_tiny_clip().double().eval(),
    "custom text, argmax": lambda: custom({}),
    "custom text, eos": lambda: custom({"pool_type": "eos", "eos_id": END}),
    "custom text, biased projection": lambda: custom({"proj_bias": True}),
    "custom text, no projection": lambda: custom({"proj_type": "none"}),
    "CLIP, eos": lambda: open_clip.CLIP(WIDTH, VISION, {**TEXT, "pool_type": "eos", "eos_id": END}).double().eval(),
}
WHOLE_CONTEXT = {
    "no causal mask": lambda: custom({"no_causal_mask": True}),
    "pooled last": lambda: custom({"pool_type": "last"}),
    "pooled first, no causal mask": lambda: custom({"pool_type": "first", "no_causal_mask": True}),
    "class token at the end": lambda: custom({"embed_cls": True}),
    "CLIP, no causal mask": lambda: open_clip.CLIP(WIDTH, VISION, {**TEXT, "no_causal_mask": True}).double().eval(),
}


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_causal_towers_need_only_the_tokens_up_to_the_end(name: str) -> None:
    clip = CAUSAL[name]()
    ids = torch.nn.functional.pad(IDS, (0, text_positions(clip).shape[0] - 20))
    trimmed = trim_padding(clip, ids)
    assert pools_at_end_token(clip)
    assert trimmed.shape == (4, int((IDS != 0).sum(dim=1).max()))
    whole = clip.encode_text(ids)
    torch.testing.assert_close(encode_sentences(clip, ids), whole, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(encode_sentences(clip, trimmed), whole, atol=1e-9, rtol=1e-9)
    words, is_word = encode_words(clip, trimmed)
    rows = torch.arange(4)
    torch.testing.assert_close(words[rows, is_word.sum(dim=1) - 1], whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", WHOLE_CONTEXT)
@torch.no_grad()
def test_other_towers_use_their_whole_context(name: str) -> None:
    clip = WHOLE_CONTEXT[name]()
    assert not pools_at_end_token(clip)
    assert trim_padding(clip, IDS) is IDS
    assert torch.equal(encode_sentences(clip, IDS), clip.encode_text(IDS))
    with pytest.raises(UserError, match="word_agg"):
        check_words(clip)


@torch.no_grad()
def test_an_image_tower_that_also_returns_its_patches() -> None:
    pixels = torch.randn(2, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, with_patches = custom({}), custom({}, output_tokens=True)
    assert torch.equal(encode_images(with_patches, pixels), encode_images(plain, pixels))


def test_where_the_parts_are() -> None:
    clip, split = build_tiny_clip(), custom({})
    assert text_tower(clip) is clip and text_tower(split) is split.text
    assert embedding_width(clip) == 64 and embedding_width(split) == WIDTH
    assert text_blocks(split) == list(split.text.transformer.resblocks) and len(text_blocks(clip)) == 2
    assert text_positions(split) is split.text.positional_embedding


@torch.no_grad()
def test_words_come_with_the_sentence_only_where_they_are_asked_for() -> None:
    clip = build_tiny_clip().double().eval()
    ids = torch.nn.functional.pad(IDS, (0, 57))
    tower = ClipTextTower(clip)
    assert not list(tower.parameters()), "CLIP's parameters keep their names"
    plain, whole = tower(ids), tower(ids, words=True)
    assert plain.words is None and plain.is_word is None
    torch.testing.assert_close(whole.sentence, plain.sentence, atol=1e-9, rtol=1e-9)
    words, is_word = encode_words(clip, trim_padding(clip, ids))
    assert torch.equal(whole.words, words) and torch.equal(whole.is_word, is_word)
