"""What every method promises, in one table: methods, and methods that are joined, on two kinds of CLIP."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_clip
from tiny import VOCABULARY, build_timm_clip, on_meta, random_tokens
from torch import Tensor, nn

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.peft import PEFT, BitFitSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.vit import compile_blocks, vision_view
from adaclip_finetune.peft import PeftMethod, build_method, choose_what_learns, trainable_report
from adaclip_finetune.peft.bitfit import BitFit
from adaclip_finetune.weights.plain import plain_copy, strict_load

Section = dict[str, Any]


def joined(*parts: Section) -> Section:
    return {"method": "joined", "config": {"methods": list(parts)}}


METHODS: dict[str, Section] = {
    "full": {"method": "full"},
    "full, of the text tower": {"method": "full", "config": {"towers": "text"}},
    "bitfit": {"method": "bitfit", "config": {"include_qkv_bias": True}},
    "ibs": {"method": "ibs"},
    "ibs by angles": {"method": "ibs", "config": {"metric": "angle", "keep_module_keywords": ["ln_post"]}},
    "ibs that keeps what evolved": {"method": "ibs", "config": {"keep_evolved": True, "normalization": False}},
    "lora": {"method": "lora", "config": {"rank": 2}},
    "dora": {"method": "lora", "config": {"rank": 2, "dora": True}},
    "ssf": {"method": "ssf"},
    "ssf of q and v in block 1": {"method": "ssf", "config": {"where": ["q", "v", "norm"], "layers": [1]}},
    "adapter": {"method": "adapter", "config": {"dim": 4}},
    "adapter behind the MLP": {"method": "adapter", "config": {"dim": 4, "position": "sequential", "layers": [0]}},
    "prompt": {"method": "prompt"},
    "deep prompts": {"method": "prompt", "config": {"depth": 2, "num_visual_prompts": 3}},
    "lisa": {"method": "lisa", "config": {"sampling_interval": 2, "active_ratio": 0.3}},
    "lisa by gradients": {"method": "lisa", "config": {"importance": "gradient", "active_ratio": 0.3}},
    "adabn": {"method": "adabn"},
    "lora and bitfit": joined({"method": "lora", "config": {"rank": 2}}, {"method": "bitfit"}),
    "all weights": joined({"method": "ssf"}, {"method": "bitfit"}, {"method": "lora", "config": {"rank": 2}}),
    "all": joined(*({"method": name} for name in ("prompt", "adapter", "lora", "ssf", "bitfit", "adabn"))),
}
CLIPS = {"open_clip": lambda: build_tiny_clip(vocabulary=VOCABULARY), "timm and Hugging Face": build_timm_clip}
every_method = pytest.mark.parametrize(("case", "kind"), [(case, kind) for case in METHODS for kind in CLIPS])


@functools.cache
def pretrained(kind: str) -> nn.Module:
    return CLIPS[kind]().double()


class Model(nn.Module):
    """A model with CLIP inside, in float64, and a head with a batch norm that always learns."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.clip: Any = copy.deepcopy(pretrained(kind))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 64)).double()

    def forward(self, dtype: torch.dtype = torch.float64) -> Tensor:
        image, text = outputs(self, dtype)
        return (self.clip.logit_scale.exp() * self.head(image) @ text.T).square().mean()


def outputs(model: Model, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return the embeddings of three images and three texts."""
    device = next(model.parameters()).device
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return model.clip.visual(pixels), model.clip.encode_text(random_tokens(3).to(device))


def config_of(case: str) -> Any:
    return load_config(None, {"peft": copy.deepcopy(METHODS[case]), "freeze_layer_num": -1})


def attached(case: str, kind: str) -> tuple[Model, PeftMethod]:
    """Return a pretrained model with the method attached, and the method, which has chosen what learns."""
    config, model = config_of(case), Model(kind)
    method = build_method(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method.attach(model.clip)
    choose_what_learns(method, model, config)
    return model, method


def train(model: Model, method: PeftMethod, epochs: range) -> None:
    """Take a step in each of these epochs."""
    for epoch in epochs:
        method.on_epoch_start(epoch)
        model.zero_grad()
        model().backward()
        method.after_backward(epoch)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 / (epoch + 1) * parameter.grad.sign()


def trained(case: str, kind: str) -> tuple[Model, PeftMethod]:
    """Return the model after three epochs."""
    model, method = attached(case, kind)
    train(model, method, range(3))
    return model, method


def assert_same(own: Model, other: Model) -> None:
    with torch.no_grad():
        for mine, theirs in zip(outputs(own), outputs(other), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_method
def test_cuda_gives_the_gradients_of_the_cpu(case: str, kind: str) -> None:
    model, _ = trained(case, kind)
    gradients = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        model().backward()
        gradients.append({n: own.grad.clone().cpu() for n, own in model.named_parameters() if own.grad is not None})
    assert gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-9)


@every_method
def test_the_outputs_at_the_start_are_those_of_the_pretrained_model(case: str, kind: str) -> None:
    model, method = attached(case, kind)
    if method.keeps_outputs:
        assert_same(model, Model(kind))
    else:
        assert not torch.allclose(outputs(model)[0], outputs(Model(kind))[0])


@every_method
def test_only_declared_parameters_change_and_are_counted(case: str, kind: str) -> None:
    before, _ = attached(case, kind)
    model, method = trained(case, kind)
    start = before.state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    declared = method.changed_parameters(model)
    assert {name.removeprefix("clip.") for name in moved if name.startswith("clip.")} == declared
    report, sizes = trainable_report(model), {name: own.numel() for name, own in model.clip.named_parameters()}
    learning = {name for name, parameter in model.clip.named_parameters() if parameter.requires_grad}
    if "evolved" in case:
        assert declared > learning
    else:
        assert declared < learning if "lisa" in case else declared == learning
    assert all((own.grad is None) == (not own.requires_grad) for own in model.parameters()) or "lisa" in case
    assert report.clip.trainable == sum(sizes[name] for name in learning)
    assert report.clip.total == sum(sizes.values())


@every_method
def test_own_state_restores_a_pretrained_model_and_holds_nothing_else(case: str, kind: str) -> None:
    model, method = trained(case, kind)
    state = {name: tensor.clone() for name, tensor in method.own_state(model).items()}
    parameters = dict(model.named_parameters())
    assert {name.removeprefix("clip.") for name in state if name.startswith("clip.") and name in parameters} == (
        method.changed_parameters(model)
    )
    fresh, _ = attached(case, kind)
    assert not fresh.load_state_dict(state, strict=False).unexpected_keys
    assert_same(fresh, model)


@every_method
def test_an_interrupted_run_continues_with_the_same_parameters(case: str, kind: str) -> None:
    """The state is saved in a form that a checkpoint can hold, and loaded into a new model."""
    straight, uninterrupted = trained(case, kind)
    for stop in (1, 2):
        first, method = attached(case, kind)
        train(first, method, range(stop))
        state = method.state_dict()
        tensors, values = {k: t.clone() for k, t in state.tensors.items()}, json.loads(json.dumps(state.values))
        second, resumed = attached(case, kind)
        resumed.load_state_dict(type(state)(tensors, values))
        second.load_state_dict(first.state_dict())
        train(second, resumed, range(stop, 3))
        assert resumed.changed_parameters(second) == uninterrupted.changed_parameters(straight)
        assert_same(second, straight)


@every_method
def test_merged_weights_compute_the_same_under_plain_names(case: str, kind: str) -> None:
    model, method = trained(case, kind)
    merged = method.merged_state(model)
    assert not any("parametrizations" in name for name in merged)
    if method.mergeable:
        assert merged.keys() == Model(kind).state_dict().keys()
    for plain in [Model(kind), attached(case, kind)[0]] if method.mergeable else [attached(case, kind)[0]]:
        strict_load(plain, merged, "this test")
        method.reset(plain)
        assert_same(plain, model)


@every_method
def test_a_tower_that_runs_block_by_block_computes_the_same(case: str, kind: str) -> None:
    model, _ = trained(case, kind)
    view = vision_view(model.clip)
    with torch.no_grad():
        pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        tokens = view.norm(view.place(pixels))
        for block in view.blocks:
            tokens = block(tokens)
        torch.testing.assert_close(view.pool(tokens), model.clip.visual(pixels), rtol=1e-9, atol=1e-9)


@every_method
def test_a_copy_is_independent_and_a_plain_copy_is_the_pretrained_tower(case: str, kind: str) -> None:
    model, _ = attached(case, kind)
    plain = Model(kind)
    plain.clip.visual = plain_copy(model.clip.visual)
    assert plain.state_dict().keys() == Model(kind).state_dict().keys()
    assert_same(plain, Model(kind))
    model, _ = trained(case, kind)
    twin, before = copy.deepcopy(model), outputs(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(outputs(twin), before, rtol=1e-9, atol=1e-9)


@every_method
def test_gradient_checkpointing_gives_the_same_gradients(case: str, kind: str) -> None:
    model, _ = trained(case, kind)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.clip.set_grad_checkpointing(checkpointing)
        model().backward()
        gradients.append({name: own.grad for name, own in model.named_parameters() if own.requires_grad})
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("case", "kind"), [("lora", "open_clip"), ("prompt", "timm and Hugging Face")])
def test_compiled_blocks_give_the_same_gradients(case: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    model, _ = trained(case, kind)
    gradients, losses = [], []
    for compiled in (False, True):
        model.zero_grad()
        if compiled:
            compile_blocks(model.clip)
        model().backward()
        gradients.append({name: own.grad for name, own in model.named_parameters() if own.requires_grad})
        with torch.no_grad():
            losses.append(model())
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)


@every_method
def test_what_learns_gets_finite_gradients_in_bf16(case: str, kind: str) -> None:
    model, _ = attached(case, kind)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.float()(torch.float32)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or bool(parameter.grad.isfinite().all()), name


LORA, PROMPT = {"method": "lora"}, {"method": "prompt"}


def test_a_list_of_methods_means_that_they_are_joined(tmp_path: Path) -> None:
    file, section = tmp_path / "config.json", tmp_path / "section.json"
    file.write_text(json.dumps({"peft": [LORA, PROMPT]}))
    section.write_text(json.dumps({"peft": [LORA, PROMPT]}))
    expected = load_config(None, {"peft": joined(LORA, PROMPT)}).peft
    for config in (
        load_config(file),
        load_config(None, {"peft": [LORA, PROMPT]}),
        load_config(None, {"peft": str(section)}),
    ):
        assert config.peft == expected and config.peft.method == "joined"
    assert load_config(file, {"peft.method": "ibs"}).peft.method == "ibs"
    method = build_method(load_config(file))
    assert not method.mergeable and not method.keeps_outputs


@pytest.mark.parametrize(
    ("methods", "fact"),
    [
        ([LORA], r"peft\.config\.methods"),
        ([LORA, LORA], "lora more than once"),
        ([LORA, {"method": "full"}], "full"),
        ([LORA, {"method": "prompt", "config": {"num_visual_prompts": 0, "num_text_prompts": 0}}], "no prompts"),
    ],
)
def test_joins_without_a_meaning_are_refused(methods: list[Section], fact: str) -> None:
    with pytest.raises(UserError, match=fact):
        load_config(None, {"peft": methods})


@pytest.mark.parametrize(("name", "says"), [("ViT-B-32-quickgelu", False), ("ViT-B-16-SigLIP2", True)])
def test_bitfit_says_if_a_tower_has_few_biases(name: str, says: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Module()
    model.clip = on_meta(name)
    BitFit(BitFitSettings()).choose(model)
    assert ("0.057 %" in caplog.text) == says


def test_every_method_is_in_the_table() -> None:
    assert {section["method"] for section in METHODS.values()} == set(PEFT)


def test_the_page_of_methods_describes_every_setting() -> None:
    page = (Path(__file__).parents[2] / "docs/methods.md").read_text()
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    assert sections.keys() == PEFT.keys()
    for name, choice in PEFT.items():
        assert all(f"`{setting}`" in sections[name] for setting in choice.settings.model_fields), name
