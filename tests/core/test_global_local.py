"""The tower global_local: golden values of the published system, and the literal form of its attention."""

import copy
import functools
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CLIP, build_tiny_clip
from golden import load_golden
from test_vit import MODELS, assert_close, build, words
from tiny import VOCABULARY, build_retriever, build_timm_clip, on_meta, random_tokens, random_videos
from torch import Tensor, nn

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.towers import GlobalLocalSettings
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.flops import count_gflops
from adaclip_finetune.model.text import ClipTextTower
from adaclip_finetune.model.towers.global_local import GlobalLocal
from adaclip_finetune.model.towers.prompt_sources import TransformerPrompts
from adaclip_finetune.model.vit import OpenBlock, tower_blocks
from adaclip_finetune.peft import build_method, choose_what_learns, trainable_report
from adaclip_finetune.weights.loaded import text_tower

OUTPUTS = {  # our names and the published ones
    "global_prompt0": "global_prompt0",
    "global_mean": "average_global_prompt",
    "class_mean": "average_frame_cls_token",
    "all_mean": "average_global_prompt_and_frame_cls_token",
}
GENERATORS = ("linear", "transformer")
every_generator = pytest.mark.parametrize("generator", GENERATORS)
every_output = pytest.mark.parametrize("output", OUTPUTS)
ALL = torch.ones(2, 3, dtype=torch.bool)


# ---- golden values ----


def our_names(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Return the tower's tensors, or their gradients, from those of a published checkpoint."""

    def by_block(table: Tensor) -> Tensor:  # (…, rows, blocks · width) → (blocks, rows, width)
        return table.reshape(-1, depth, table.shape[-1] // depth).transpose(0, 1)

    found = {}
    for name, tensor in state.items():
        plain = name.removeprefix("clip.")
        if plain == "visual.prompt_embeddings":
            found["global_prompts"] = tensor[0]
        elif plain in ("visual_prompt_embedding", "unified_prompt_embedding.weight"):
            found["prompts.table"] = by_block(tensor)
        elif "_text_prompt_proj_layer." in plain:
            found["prompts." + plain.replace("_text_prompt_proj_layer", "")] = tensor
        elif plain.startswith("PromptTransformer."):
            found[plain.replace("PromptTransformer", "prompts.mixer")] = tensor
        elif plain.startswith("unified_prompt_mlp."):
            numbered = plain.replace("c_fc", "0").replace("c_proj", "2")
            found[numbered.replace("unified_prompt_mlp", "prompts.to_text")] = tensor
    return found


def golden_model(state: dict[str, Tensor], settings: GlobalLocalSettings) -> GlobalLocal:
    """Return the tower of a golden case, in float64, with the weights of the published model."""
    vision = {"image_size": 24, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16}
    text = {"context_length": 24, "vocab_size": 40, "width": 64, "heads": 2, "layers": 3}
    clip = open_clip.CLIP(24, vision, text, quick_gelu=True)
    plain = {name.removeprefix("clip."): tensor for name, tensor in state.items()}
    clip.load_state_dict({name: plain[name] for name in clip.state_dict()})
    tower = GlobalLocal(settings, clip)
    tower.load_state_dict(our_names(state, depth=3))
    clip.double().requires_grad_(False)
    return tower.double()


def check_golden(case: dict[str, Any], generator: str, output: str) -> None:
    settings = {"generator": generator, "output": output, "frames": 4, "postfix_prompts": True}
    tower = golden_model(case["state_dict"], GlobalLocalSettings(**settings))
    ids, pixels = case["inputs"]["input_ids"][:, 0], case["inputs"]["video"][:, 0].double()
    text = tower.text_tower()(ids).sentence
    video = tower(pixels, torch.ones(pixels.shape[:2], dtype=torch.bool))
    assert video.shape == (3, 1, 24)
    similarity = tower.clip.logit_scale.exp() * F.normalize(text, dim=-1) @ F.normalize(video[:, 0], dim=-1).T
    pairs = torch.arange(3)
    loss = (F.cross_entropy(similarity, pairs) + F.cross_entropy(similarity.T, pairs)) / 2
    loss.backward()
    expected = case["outputs"][OUTPUTS[output]]
    assert_close(text, expected["sequence_output"][:, 0])
    assert_close(video, expected["visual_output"])
    assert_close(similarity, expected["similarity_eval"])
    assert loss.item() == pytest.approx(float(expected["loss"]), rel=1e-6)
    own = {name: parameter.grad for name, parameter in tower.named_parameters()}
    if "grads" in expected:
        published = our_names(expected["grads"], depth=3)
        assert published.keys() == own.keys()
        for name, gradient in published.items():
            assert_close(own[name], gradient)
    else:
        ones = {name: torch.ones_like(tensor) for name, tensor in case["state_dict"].items()}
        for published, norm in expected["grad_norms"].items():
            (name,) = our_names({published: ones[published]}, depth=3)
            assert float(own[name].norm()) == pytest.approx(float(norm), rel=1e-5)


@every_output
def test_golden_values_of_the_linear_generator(output: str) -> None:
    check_golden(load_golden("global_local_linear"), "linear", output)


@every_output
def test_golden_values_of_the_transformer_generator(output: str, shared: Path) -> None:
    folder = shared / "reference/center_clip_dgl/golden"
    case = torch.load(folder / "dev_dgl_transformer.pt", weights_only=True)
    weights = torch.load(folder / "dev_dgl_transformer_weights.pt", weights_only=True)
    check_golden({**case, "state_dict": weights}, "transformer", output)


@torch.no_grad()
def test_golden_prompts_of_the_transformer_generator() -> None:
    case = load_golden("global_local_transformer")
    state = {name.removeprefix("prompts."): tensor for name, tensor in our_names(case["state_dict"], 3).items()}
    del state["global_prompts"]
    prompts = TransformerPrompts(
        GlobalLocalSettings(generator="transformer", frames=4, postfix_prompts=True), 3, 64, 64, 4
    )
    prompts.load_state_dict(state)
    expected = case["outputs"]["global_prompt0"]
    assert_close(prompts.text(), expected["text_prompts_layers_1_len_width"][:, 0, :4])
    assert_close(prompts.local(4).flatten(1, 2), expected["visual_prompts_layers_1_len_width"][:, 0])


# ---- the literal form of the attention, on towers of all kinds ----


def build_tower(clip: nn.Module, **settings: Any) -> GlobalLocal:
    """Return the tower of a CLIP in float64, with prompts that matter, as many as differ in their three numbers."""
    settings = {
        "generator": "transformer",
        "global_prompts": 3,
        "local_prompts": 2,
        "text_prompts": 5,
        "frames": 3,
    } | settings
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tower = GlobalLocal(GlobalLocalSettings(**settings), clip.double())
        with torch.no_grad():
            tower.global_prompts.normal_()
    return tower.double()


def tiny_tower(**settings: Any) -> GlobalLocal:
    return build_tower(build_tiny_clip(vocabulary=VOCABULARY), **settings)


def linear_or_transformer(generator: str, **settings: Any) -> GlobalLocal:
    return tiny_tower(generator=generator, text_prompts=2 if generator == "linear" else 5, **settings)


def pixels_for(clip: Any, count: int = 2, frames: int = 3) -> Tensor:
    size = clip.visual.image_size[0]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, frames, 3, size, size, generator=generator, dtype=torch.float64)


def literal_video(tower: GlobalLocal, pixels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the global prompts and the frames' own tokens after the last block: whole blocks, under one big mask."""
    view, (count, frames) = tower.view, mask.shape
    g, p = tower.settings.global_prompts, tower.settings.local_prompts
    tokens = view.norm(view.place(pixels.flatten(0, 1))).unflatten(0, (count, frames))
    length = tokens.shape[2]
    in_frame = torch.cat([torch.full((p + view.prefix,), -1), torch.arange(length - view.prefix)])
    places = torch.cat([torch.full((g,), -1), in_frame.repeat(frames)])
    owner = torch.cat([torch.full((g,), -1), torch.arange(frames).repeat_interleave(p + length)])
    sees = (owner[None, :] == -1) | (owner[:, None] == owner[None, :])
    seen = sees.expand(count, -1, -1).clone()
    seen[:, :g, g:] = mask.repeat_interleave(p + length, dim=1)[:, None]
    prompts, local = tower.global_prompts.expand(count, -1, -1), tower.prompts.local(frames)
    for number, block in enumerate(view.blocks):
        own = local[number].expand(count, frames, -1, -1)
        whole = torch.cat([prompts, torch.cat([own, tokens], dim=2).flatten(1, 2)], dim=1)
        whole = block(whole, mask=seen[:, None], positions=places)
        prompts = whole[:, :g]
        tokens = whole[:, g:].unflatten(1, (frames, p + length))[:, :, p:]
    return prompts, tokens


@pytest.mark.parametrize("name", [name for name in MODELS if name != "CoCa"])
@torch.no_grad()
def test_both_towers_equal_whole_blocks_under_one_mask(name: str) -> None:
    clip: Any = build(*MODELS[name])
    tower = build_tower(clip, output="class_mean")
    pixels, mask = pixels_for(clip), torch.tensor([[True, True, True], [True, False, True]])
    prompts, tokens = literal_video(tower, pixels, mask)
    pooled = tower.view.pool(tokens.flatten(0, 1)).unflatten(0, (2, 3))
    frames = torch.stack([rows[real].mean(dim=0) for rows, real in zip(pooled, mask, strict=True)])
    assert_close(tower(pixels, mask), frames[:, None], 1e-9)
    tower.settings = tower.settings.model_copy(update={"output": "global_prompt0"})
    image = prompts[:, :1].expand(-1, tokens.shape[2], -1)  # an image whose tokens are all the prompt
    assert_close(tower(pixels, mask), tower.view.pool(image)[:, None], 1e-9)

    ids, text = words(clip), text_tower(clip)
    length = ids.shape[1]
    hidden = text.token_embedding(ids) + text.positional_embedding[:length]
    causal = None
    if text.attn_mask is not None:
        causal = torch.ones(length + 5, length + 5, dtype=torch.bool).tril()
    for own, block in zip(tower.prompts.text(), tower_blocks(clip, "text"), strict=False):
        assert isinstance(block, OpenBlock)
        hidden = block(torch.cat([hidden[:, :1], own.expand(3, -1, -1), hidden[:, 1:]], dim=1), mask=causal)
        hidden = torch.cat([hidden[:, :1], hidden[:, 6:]], dim=1)
    hidden = text.ln_final(hidden)
    ends = {"argmax": ids.argmax(dim=1), "eos": (ids == 2).int().argmax(dim=1), "last": torch.full((3,), -1)}
    pooling = text.text_pool_type if text is clip else text.pool_type
    row = hidden[torch.arange(3), ends[pooling]]
    projection = text.text_projection
    expected = projection(row) if isinstance(projection, nn.Linear) else row @ projection
    assert_close(tower.text_tower()(ids).sentence, expected, 1e-9)


# ---- what the tower promises ----


@torch.no_grad()
def test_only_the_transformer_generator_tells_the_order_of_frames() -> None:
    for generator in GENERATORS:
        tower = linear_or_transformer(generator)
        pixels = pixels_for(tower.clip)
        back = torch.allclose(tower(pixels.flip(1), ALL), tower(pixels, ALL), rtol=1e-9, atol=1e-9)
        assert back == (generator == "linear")


@pytest.mark.parametrize("frames", [1, 2, 3, 7])
@torch.no_grad()
def test_prompts_are_interpolated_for_any_number_of_frames(frames: int) -> None:
    tower = tiny_tower()
    known, made = tower.prompts.local(3), tower.prompts.local(frames)
    rows = known.permute(0, 2, 3, 1).flatten(0, 1)  # what F.interpolate takes: (n, width, frames)
    expected = F.interpolate(rows, frames, mode="linear").unflatten(0, (2, 2)).permute(0, 3, 1, 2)
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
    pixels = pixels_for(tower.clip, frames=frames)
    assert tower(pixels, torch.ones(2, frames, dtype=torch.bool)).shape == (2, 1, 64)
    shares = tower.frame_shares(frames)
    torch.testing.assert_close(shares, torch.full((1, frames), 1 / frames))


@every_generator
@torch.no_grad()
def test_word_features_exclude_the_prompts(generator: str) -> None:
    tower = linear_or_transformer(generator)
    text, ids = tower.text_tower(), random_tokens(4)
    ends = ids.argmax(dim=1)
    features = text(ids, words=True)
    assert features.words is not None and features.is_word is not None
    assert features.words.shape == (4, int(ends.max()) + 1, 64)
    assert torch.equal(features.is_word.sum(dim=1), ends + 1)
    torch.testing.assert_close(features.words[torch.arange(4), ends], features.sentence)
    torch.testing.assert_close(text(ids).sentence, features.sentence)
    # The start token precedes the prompts: its output is CLIP's own.
    plain = ClipTextTower(tower.clip)(ids, words=True).words
    assert plain is not None
    torch.testing.assert_close(features.words[:, 0], plain[:, 0], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(features.words[:, 1:], plain[:, 1:])


def loss_of(tower: GlobalLocal, text: nn.Module) -> Tensor:
    video = tower(pixels_for(tower.clip), ALL)[:, 0]
    return (text(random_tokens(2)).sentence @ video.T).square().mean()


@every_generator
@every_output
def test_no_step_depends_on_the_last(generator: str, output: str) -> None:
    tower = linear_or_transformer(generator, output=output)
    text = tower.text_tower()
    with torch.no_grad():
        before = [text(random_tokens(2)).sentence, tower(pixels_for(tower.clip), ALL)]
        tower.prompts.table += torch.rand_like(tower.prompts.table)
        after = [text(random_tokens(2)).sentence, tower(pixels_for(tower.clip), ALL)]
    assert not any(torch.allclose(*pair) for pair in zip(before, after, strict=True))


def test_prompts_are_made_once_a_batch_in_each_tower() -> None:
    tower, calls = tiny_tower(), []
    tower.checkpointing = True
    assert isinstance(tower.prompts, TransformerPrompts)
    tower.prompts.mixer.register_forward_hook(lambda *_: calls.append(1))
    loss_of(tower, tower.text_tower()).backward()
    assert len(calls) == 2


class Watched(GlobalLocal):
    def leave(self, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        self.passed, self.state = dict(state["global"]), state
        return super().leave(tokens, state)


def test_a_block_that_runs_again_replaces_nothing_that_would_hold_its_activations() -> None:
    tower = Watched(GlobalLocalSettings(), build_tiny_clip(vocabulary=VOCABULARY).double()).double()
    tower.checkpointing = True
    tower(pixels_for(tower.clip), ALL).sum().backward()
    assert len(tower.passed) == 3
    assert all(tower.state["global"][number] is prompts for number, prompts in tower.passed.items())


@pytest.mark.parametrize("layers", [1, 3])
@every_generator
def test_towers_may_differ_in_depth(generator: str, layers: int) -> None:
    text = {"context_length": 77, "vocab_size": VOCABULARY, "width": 32, "heads": 1, "layers": layers}
    clip = open_clip.CLIP(64, TINY_CLIP["vision_cfg"], text)
    tower = build_tower(clip, generator=generator, text_prompts=2)
    assert len(tower.prompts.table) == max(2, layers)
    loss_of(tower, tower.text_tower()).backward()
    assert tower.prompts.table.grad.flatten(1).abs().sum(dim=1).min() > 0


def test_a_copy_is_independent() -> None:
    model = retriever()
    other = copy.deepcopy(model)
    ids = random_tokens(2)
    with torch.no_grad():
        before = model.encode_text(ids).sentence
        torch.testing.assert_close(other.encode_text(ids).sentence, before)
        other.tower.prompts.table.zero_()
        torch.testing.assert_close(model.encode_text(ids).sentence, before)
        assert not torch.allclose(other.encode_text(ids).sentence, before)


# ---- in the retriever ----


def retriever(config: dict[str, Any] | None = None, clip: nn.Module | None = None, **settings: Any) -> Any:
    given = {"use_policy": False, "tower": {"method": "global_local", "config": config or {}}, **settings}
    return build_retriever(clip, **given)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 433_664),
        ({"postfix_prompts": True}, 827_392),
        ({"generator": "transformer", "postfix_prompts": True}, 9_575_168),
        ({"generator": "transformer", "postfix_prompts": True, "frames": 64}, 11_492_096),
        ({"generator": "transformer"}, 9_575_168 - 4 * 12 * 768),
    ],
)
def test_the_numbers_of_parameters_that_learn_are_the_published_ones(settings: dict[str, Any], count: int) -> None:
    given = {"freeze_clip": True, "tower": {"method": "global_local", "config": settings}, "use_policy": False}
    with torch.device("meta"):
        model = retriever(settings, on_meta("ViT-B-32-quickgelu"), freeze_clip=True)
    config = load_config(None, given)
    choose_what_learns(build_method(config), model, config)
    report = trainable_report(model)
    assert report.all.trainable == report.aggregator.trainable == count
    assert report.clip.total == 151_277_313
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len({id(parameter) for parameter in model.parameters()})
    assert not any(name.startswith("text_tower.") for name in model.state_dict())


@every_generator
def test_initial_values_are_the_published_ones(generator: str) -> None:
    tower = GlobalLocal(GlobalLocalSettings(generator=generator), open_clip.CLIP(**PATCHES_OF_32))
    bound = (6 / (3 * 32**2 + 768)) ** 0.5
    assert bound == pytest.approx(0.0395, abs=1e-4)
    uniform = [tower.global_prompts] if generator == "transformer" else [tower.global_prompts, tower.prompts.table]
    for table in uniform:
        assert 0.9 * bound < table.abs().max() <= bound
        assert table.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    if generator == "transformer":
        assert tower.prompts.table.std().item() == pytest.approx(1, rel=0.05)


PATCHES_OF_32 = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 32, "width": 768, "layers": 1, "head_width": 64},
    "text_cfg": {"context_length": 8, "vocab_size": 10, "width": 32, "heads": 1, "layers": 1},
}


METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "bitfit": {"method": "bitfit", "config": {"include_qkv_bias": True}},
    "lora": {"method": "lora", "config": {"rank": 2}},
    "ssf": {"method": "ssf", "config": {"where": ["patch", "norm", "q", "k", "v", "out", "fc", "proj"]}},
    "adapter": {"method": "adapter", "config": {"dim": 4}},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("output", ["global_prompt0", "class_mean"])
@every_generator
def test_all_that_learns_gets_gradients_and_the_selector_too(method: str, output: str, generator: str) -> None:
    """With every method, in bf16, so that no process has parameters that it does not use."""
    section = {"method": "global_local", "config": {"generator": generator, "output": output, "postfix_prompts": True}}
    settings = {"tower": section, "peft": METHODS[method], "freeze_layer_num": -1, "policy_weights": "random"}
    config = load_config(None, settings)
    clip, attached = build_tiny_clip(vocabulary=VOCABULARY), build_method(config)
    attached.attach(clip)
    model = build_retriever(clip, tower=section)
    choose_what_learns(attached, model, config)
    with torch.autocast("cpu", torch.bfloat16):
        text, video = model.train()(TrainBatch(random_videos(), [], random_tokens(), torch.rand(4, 6)))
        model.similarity(text, video).log_softmax(dim=1).diagonal().mean().backward()
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    unused = {name for name, parameter in learning.items() if parameter.grad is None}
    assert not unused - {"clip.logit_bias"}
    assert all(parameter.grad.isfinite().all() for parameter in learning.values() if parameter.grad is not None)
    assert model.selector is not None
    for name in ("selector.scorer.0.weight", "tower.global_prompts", "tower.prompts.table"):
        assert learning[name].grad.abs().max() > 0


@torch.no_grad()
def test_word_pooling_and_headers_work() -> None:
    model = retriever(word_agg="mlp", sim_header="seqTransf").eval()
    assert model.encode_text(random_tokens()).sentence.shape == (4, 64)
    features = model.encode_video(random_videos(view=None))
    assert features.tokens.shape == (4, 1, 64)
    torch.testing.assert_close(features.frame_weights, torch.full((4, 6), 1 / 6))
    assert model.encode_image(random_videos().frames[0, :1]).shape == (1, 64)


def test_the_last_block_encodes_frames_only_if_they_are_read() -> None:
    whole, without = (count_gflops(retriever({"output": output}), 6) for output in ("class_mean", "global_prompt0"))
    assert whole.video > 6 * whole.clip_frame > without.video


# ---- refusals ----


@pytest.mark.parametrize("build_clip", [build_timm_clip, functools.partial(build, *MODELS["CoCa"])])
def test_text_towers_that_cannot_have_prompts_are_refused(build_clip: Any) -> None:
    with pytest.raises(UserError, match="tower global_local"):
        GlobalLocal(GlobalLocalSettings(), build_clip())


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"tower": {"method": "global_local", "config": {"text_prompts": 8}}}, "local_prompts"),
        ({"peft": {"method": "prompt", "config": {"num_visual_prompts": 0}}}, "peft.method prompt"),
        (
            {"peft": [{"method": "prompt", "config": {"num_visual_prompts": 0}}, {"method": "lora"}]},
            "peft.method prompt",
        ),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], fact: str) -> None:
    with pytest.raises(UserError, match=fact):
        load_config(None, {"tower": {"method": "global_local"}, **settings})


def test_prompts_alone_can_be_trained() -> None:
    load_config(None, {"tower": {"method": "global_local"}, "freeze_clip": True, "use_policy": False})
    with pytest.raises(UserError, match="nothing to train"):
        load_config(None, {"freeze_clip": True, "use_policy": False})


def test_the_page_of_towers_describes_every_setting_and_the_numbers_of_parameters() -> None:
    page = (Path(__file__).parents[2] / "docs/towers.md").read_text()
    section = page.split("## global_local\n")[1].split("\n## ")[0]
    assert all(f"`{name}`" in section for name in GlobalLocalSettings.model_fields)
    assert all(number in section for number in ("433,664", "827,392", "9,538,304", "9,575,168"))
