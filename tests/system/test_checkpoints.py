"""Checkpoints of whole retrievers: whose they are, what their tensors demand, what their settings say; nothing runs."""

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_clip
from foreign import write_evil, write_published
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaclip_finetune.cli import main
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.training.checkpoint import save_tensors
from adaclip_finetune.training.session import open_model
from adaclip_finetune.weights.checkpoints import Kind, check_settings, describe, read_checkpoint, with_its_clip
from adaclip_finetune.weights.clip_weights import Weights, load_clip, load_pretrained
from adaclip_finetune.weights.digest import weights_digest
from adaclip_finetune.weights.published import to_our_names, to_published_names

# The settings of the small models below, as a published config has them.
SETTINGS: dict[str, Any] = {
    "num_frm": 6,
    "top_k": 2,
    "policy_backbone": "raw",
    "rescale_size": 8,
    "hidden_dim": 64,
    "mlp_hidden_dim": 32,
    "frame_agg": "mlp",
}
CLIP = {f"clip.{name}": tensor for name, tensor in build_tiny_clip(seed=5).state_dict().items()}


def blank(settings: dict[str, Any]) -> VideoRetriever:
    config = load_config(None, settings)
    towers = Weights({name.removeprefix("clip."): tensor for name, tensor in CLIP.items()}, "resume: x")
    return VideoRetriever(config, load_clip(config, from_checkpoint=towers))


def published_state(**settings: Any) -> dict[str, Tensor]:
    """A model of these settings under the published names."""
    return to_published_names(blank({**SETTINGS, **settings}).state_dict())


@pytest.fixture
def such(tmp_path: Path) -> Path:
    return write_published(tmp_path / "such.pth", published_state(), SETTINGS)


# ---- published AdaCLIP ----


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_published_checkpoint_is_read_without_easydict(tmp_path: Path, zipped: bool, prefix: str) -> None:
    state = published_state()
    settings = {**SETTINGS, "peft": {"method": "bitfit", "config": {"keep_module_keywords": ["ln"]}}, "betas": [0.9, 1]}
    before = set(torch.serialization.get_safe_globals())
    named = {prefix + name: tensor for name, tensor in state.items()}
    checkpoint = read_checkpoint(write_published(tmp_path / "such.pth", named, settings, zipped))
    assert "easydict" not in sys.modules
    assert set(torch.serialization.get_safe_globals()) == before
    assert (checkpoint.kind, checkpoint.epoch) == (Kind.PUBLISHED, "4")
    assert json.loads(json.dumps(checkpoint.settings)) == json.loads(json.dumps(settings))
    ours = to_our_names(state)
    assert checkpoint.state.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in checkpoint.state.items())


def test_the_published_recipe_is_read_without_any_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CNN is in the checkpoint, as its CLIP is."""
    settings = {**SETTINGS, "policy_backbone": "mobilenet_v3_large"}
    state = published_state(policy_backbone="mobilenet_v3_large", policy_weights="random")
    path = write_published(tmp_path / "such.pth", state, settings)

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    config = load_config(None, {**settings, "resume": str(path), "no_output": True, "device": "cpu"})
    assert config.policy_weights == "imagenet"
    model = open_model(config).model
    ours = to_our_names(state)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.state_dict().items())


def test_settings_that_differ_are_told_once_those_of_the_model_first(tmp_path: Path) -> None:
    stored = {**SETTINGS, "max_txt_len": 32, "frame_agg_temp": 0.5, "top_k": 3, "learning_rate": 1e-4, "batch_size": 64}
    stored |= {"unknown_here": 1, "betas": [0.9, 0.98], "output_dir": "/elsewhere", "peft": {"method": "ibs"}}
    checkpoint = read_checkpoint(write_published(tmp_path / "such.pth", published_state(), stored))
    first, *lines = describe(checkpoint, load_config(None, SETTINGS)).splitlines()
    assert first.startswith(f"resume: {tmp_path / 'such.pth'} is a published AdaCLIP checkpoint of epoch 4;")
    assert [line.split() for line in lines] == [
        ["top_k", "3", "→", "2"],
        ["frame_agg_temp", "0.5", "→", "1.0"],
        ["max_txt_len", "32", "→", "20"],
        ["batch_size", "64", "→", "32"],
        ["peft.method", "ibs", "→", "full"],
    ]


@pytest.mark.parametrize(
    ("made_with", "given", "named"),
    [
        ({}, {"num_frm": 8}, {"num_frm": "6"}),
        ({}, {"hidden_dim": 128}, {"hidden_dim": "64"}),
        ({}, {"mlp_hidden_dim": 16}, {"mlp_hidden_dim": "32"}),
        ({}, {"rescale_size": 9}, {"rescale_size": "8"}),
        ({}, {"mlp_type": "fc"}, {"mlp_type": "mlp"}),
        ({}, {"rnn": "lstm"}, {"rnn": "transformer"}),
        ({"rnn": "bilstm"}, {"rnn": "lstm"}, {"rnn": "bilstm"}),
        ({"rnn": "lstm"}, {"use_rnn": False}, {"use_rnn": "true"}),
        ({}, {"frame_agg": None}, {"frame_agg": "mlp"}),
        ({"frame_agg": None}, {"frame_agg": "transformer"}, {"frame_agg": "none or qscore"}),
        ({"frame_agg": "transformer"}, {"frame_agg": "mlp"}, {"frame_agg": "transformer"}),
        ({"frame_agg": None, "word_agg": "mlp"}, {"frame_agg": None}, {"word_agg": "mlp"}),
        ({}, {"sim_header": "seqTransf"}, {"sim_header": "meanP"}),
        ({"sim_header": "transformer"}, {"sim_header": "transformer", "top_k": 4}, {"top_k": "2"}),
        ({"use_policy": False}, {}, {"use_policy": "false"}),
        ({}, {"use_policy": False}, {"use_policy": "true"}),
        ({"rescale_size": 7}, {"policy_backbone": "clip", "rescale_size": 7}, {"policy_backbone": "raw"}),
        ({}, {"policy_backbone": "resnet50"}, {"policy_backbone": "raw or clip or frozen_clip"}),
        ({}, {"num_frm": 8, "rnn": "lstm", "frame_agg": None}, {"num_frm": "6", "rnn": "transformer"}),
    ],
)
def test_a_setting_that_contradicts_the_tensors_is_named_with_the_way_out(
    tmp_path: Path, made_with: dict[str, Any], given: dict[str, Any], named: dict[str, str]
) -> None:
    stored = {**SETTINGS, **made_with}
    checkpoint = read_checkpoint(write_published(tmp_path / "such.pth", published_state(**made_with), stored))
    check_settings(checkpoint, load_config(None, stored))
    with pytest.raises(UserError) as refused:
        check_settings(checkpoint, load_config(None, {**SETTINGS, **given}))
    *_, way_out = str(refused.value).splitlines()
    for name, there in named.items():
        assert any(line.startswith(f"  {name} is ") and line.endswith(f", there {there}") for line in lines(refused))
    assert way_out.startswith("To load it: --")
    # And the way out works.
    flags = [word.split() for word in way_out.removeprefix("To load it: --").split(" --")]
    repaired = {name: _value(value) for name, value in flags}
    check_settings(checkpoint, load_config(None, {**SETTINGS, **given, **repaired}))


def lines(refused: pytest.ExceptionInfo[UserError]) -> list[str]:
    return str(refused.value).splitlines()


def _value(word: str) -> Any:
    plain = {"none": None, "true": True, "false": False}
    return plain[word] if word in plain else int(word) if word.isdecimal() else word


def test_tensors_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    state = published_state()
    del state["sampler.linear.0.weight"]
    checkpoint = read_checkpoint(write_published(tmp_path / "such.pth", state, SETTINGS))
    with pytest.raises(UserError, match=r"such\.pth lacks tensors"):
        check_settings(checkpoint, load_config(None, SETTINGS))
    lacking = read_checkpoint(
        write_published(tmp_path / "b.pth", {k: v for k, v in published_state().items() if "0.bias" not in k}, SETTINGS)
    )
    with pytest.raises(UserError, match=r"(?s)resume: .*b\.pth does not fit .*missing: selector\.scorer\.0\.bias"):
        open_model(load_config(None, SETTINGS), lacking)


def test_a_backbone_that_contradicts_the_checkpoint(such: Path) -> None:
    config = load_config(None, {**SETTINGS, "clip_backbone": "ViT-B/16"})
    with pytest.raises(UserError, match=rf"clip_backbone ViT-B/16 contradicts resume: {such}.*patch_size|image_size"):
        load_clip(config, from_checkpoint=read_checkpoint(such).towers())


def test_clip_before_it_learned_is_known_by_its_shapes_or_asked_for(
    such: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, SETTINGS)
    loaded = load_clip(config, from_checkpoint=read_checkpoint(such).towers())
    with pytest.raises(UserError, match=r"of no architecture that OpenAI published.*give clip_weights"):
        load_pretrained(config, loaded)
    monkeypatch.setattr("adaclip_finetune.weights.clip_weights.load_clip", lambda config: config.clip_backbone)
    with torch.device("meta"):
        b_16 = load_clip(load_config(None, {"clip_backbone": "ViT-B/16"}), with_weights=False)
    assert load_pretrained(config, b_16) == "ViT-B-16-quickgelu:openai"
    assert load_pretrained(load_config(None, {"clip_backbone": "RN50:cc12m"}), b_16) == "RN50:cc12m"


def test_clip_of_the_same_shapes_may_not_be_what_a_checkpoint_began_with(
    such: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, SETTINGS)
    openai = load_clip(config, from_checkpoint=read_checkpoint(such).towers())
    with torch.device("meta"):
        b_16 = load_clip(load_config(None, {"clip_backbone": "ViT-B/16"}), with_weights=False)
    monkeypatch.setattr("adaclip_finetune.weights.clip_weights.load_clip", lambda config: openai)
    of = {"pretrained": None, "source": "/theirs/clip.pt"}
    right = replace(b_16, description={**of, "digest": weights_digest(openai.module)})
    assert load_pretrained(config, right) is openai
    with pytest.raises(UserError, match=r"began with /theirs/clip\.pt .*give clip_weights"):
        load_pretrained(config, replace(b_16, description={**of, "digest": "0" * 64}))


# ---- CLIP4Clip ----


def clip4clip(header: str) -> dict[str, Tensor]:
    """Its tensors, as facts: CLIP's, and for seqTransf four blocks and 77 positions."""
    if header == "meanP":
        return dict(CLIP)
    generator = torch.Generator().manual_seed(2)
    one = {n.split("resblocks.0.")[1]: t for n, t in CLIP.items() if n.startswith("clip.transformer.resblocks.0.")}
    temporal = {
        f"transformerClip.resblocks.{i}.{n}": torch.randn(t.shape, generator=generator) / 10
        for i in range(4)
        for n, t in one.items()
    }
    return CLIP | temporal | {"frame_position_embeddings.weight": torch.randn(77, 64, generator=generator)}


@pytest.mark.parametrize("header", ["meanP", "seqTransf"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_clip4clip_is_recognised_and_loaded(tmp_path: Path, header: str, prefix: str) -> None:
    state = clip4clip(header)
    path = tmp_path / "pytorch_model.bin.4"
    torch.save({prefix + name: tensor for name, tensor in state.items()}, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.kind is Kind.CLIP4CLIP
    settings = {"num_frm": 12, "use_policy": False, "sim_header": header}
    config = load_config(None, settings)
    check_settings(checkpoint, config)
    model = open_model(config, checkpoint).model
    assert torch.equal(model.state_dict()["clip.visual.proj"], state["clip.visual.proj"])
    if model.header is not None:
        assert torch.equal(model.header.positions.weight, state["frame_position_embeddings.weight"])
        last = "transformer.resblocks.3.mlp.c_fc.weight"
        assert torch.equal(model.header.state_dict()[last], state["transformerClip.resblocks.3.mlp.c_fc.weight"])


def test_clip4clip_says_which_settings_it_needs(tmp_path: Path) -> None:
    torch.save(clip4clip("seqTransf"), tmp_path / "model.bin")
    checkpoint = read_checkpoint(tmp_path / "model.bin")
    with pytest.raises(UserError) as refused:
        check_settings(checkpoint, load_config(None, {"frame_agg": "mlp"}))
    assert "is a CLIP4Clip checkpoint" in lines(refused)[0]
    assert lines(refused)[-1] == "To load it: --use_policy false --sim_header seqTransf --frame_agg none"
    other = load_config(None, {"use_policy": False, "sim_header": "seqTransf", "frame_agg": "qscore"})
    check_settings(checkpoint, other)
    assert "frame_agg  none → qscore" in describe(checkpoint, other)


# ---- ours ----


@pytest.fixture
def config(project: dict[str, Any]) -> Config:
    return load_config(None, project)


@pytest.mark.parametrize("policy_backbone", ["raw", "frozen_clip"])
def test_an_adapter_is_laid_over_the_pretrained_clip(
    project: dict[str, Any], tmp_path: Path, policy_backbone: str
) -> None:
    config = load_config(None, {**project, "policy_backbone": policy_backbone})
    learned = VideoRetriever(config, load_clip(config))
    for name, parameter in learned.named_parameters():
        if name.endswith("bias") or not name.startswith(("clip.", "selector.backbone.")):
            parameter.data += 1
    pretrained = VideoRetriever(config, load_clip(config)).state_dict()
    copies = "selector.backbone.visual."
    adapter = {
        name: tensor
        for name, tensor in learned.state_dict().items()
        if not name.startswith(copies) and (not name.startswith("clip.") or not torch.equal(tensor, pretrained[name]))
    }
    assert 0 < sum(name.startswith("clip.") for name in adapter) < sum(name.startswith("clip.") for name in pretrained)
    path, metadata = tmp_path / "adapter.safetensors", {"content": "adapter", "config": config.model_dump_json()}
    save_tensors(path, adapter, metadata)
    checkpoint = read_checkpoint(path)
    assert checkpoint.towers() is None
    model = open_model(config, checkpoint).model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, adapter.get(name, pretrained[name])), name
    for lacking, message in (
        ("selector.scorer.0.bias", "missing: selector"),
        ("aggregator.scorer.0.bias", "missing: agg"),
    ):
        save_tensors(path, {name: t for name, t in adapter.items() if name != lacking}, metadata)
        with pytest.raises(UserError, match=message):
            open_model(config, read_checkpoint(path))
    save_tensors(path, {**adapter, "clip.extra": torch.zeros(2)}, metadata)
    with pytest.raises(UserError, match=r"unexpected: clip\.extra"):
        open_model(config, read_checkpoint(path))


def test_an_adapter_tells_which_clip_it_was_learned_on(config: Config, tmp_path: Path) -> None:
    elsewhere = config.model_copy(update={"clip_weights": "/elsewhere/clip"})
    metadata = {"content": "adapter", "epoch": "2", "config": elsewhere.model_dump_json()}
    save_tensors(tmp_path / "adapter.safetensors", {"a": torch.zeros(1)}, metadata)
    told = describe(read_checkpoint(tmp_path / "adapter.safetensors"), config)
    assert f"clip_weights  /elsewhere/clip → {config.clip_weights}" in told
    assert "an adapter of ours of epoch 2" in told


# ---- what is refused ----


@pytest.mark.parametrize("how", ["zip", "old", "2", "4"])
def test_a_pickle_that_attacks_is_refused_in_words(
    tmp_path: Path, how: str, project: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    canary, path = tmp_path / "canary", tmp_path / "such.pth"
    write_evil(path, canary, {"arch": "x", "state_dict": published_state(), "config": SETTINGS}, how)
    (tmp_path / "config.json").write_text(json.dumps({**project, "resume": str(path), "no_output": True}))
    assert main(["train", "--config", str(tmp_path / "config.json"), "--do_inference"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"adaclip: error: resume: {path}: is no state dict and no checkpoint")
    assert "nothing of it was run" in error and "Traceback" not in error and "weights_only" not in error
    assert not canary.exists()
    pickle.loads(path.read_bytes()) if how.isdecimal() else torch.load(path, weights_only=False)
    assert canary.exists(), "the file was harmless: the test shows nothing"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no tensors by name"),
        ({}, "holds no tensors by name"),
        ({"epoch": 3, "optimizer_state_dict": {}, "loss": 0.5}, "holds no tensors by name"),
        ({"a": torch.zeros(2)}, r"holds no clip\.logit_scale"),
        ({n.removeprefix("clip."): t for n, t in CLIP.items()}, "CLIP weights alone belong into clip_weights"),
        ({**CLIP, "cross.layer.weight": torch.zeros(2)}, r"no.* has tensors of these names: cross\.layer\.weight"),
        ({"state_dict": {"clip.logit_scale": 5}, "config": {}}, "holds no tensors by name"),
    ],
)
def test_unknown_files_are_told_which_kinds_there_are(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match=message) as refused:
        read_checkpoint(tmp_path / "file.pth")
    for kind in ("adapter.safetensors", "published AdaCLIP checkpoints", "CLIP4Clip checkpoints"):
        assert kind in str(refused.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, message in (("file.safetensors", "cannot be read as safetensors"), ("file.pth", "is no state dict")):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 9)
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match=r"is a folder; give a weights file in it"):
        read_checkpoint(tmp_path)
    save_file(CLIP, tmp_path / "a.safetensors", metadata={"format": "adaclip-finetune/1", "config": "[1]"})
    with pytest.raises(UserError, match="no settings in the config of its metadata"):
        read_checkpoint(tmp_path / "a.safetensors")


# ---- a run ----


def test_a_run_begins_with_a_published_checkpoint(project: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    state = published_state()
    path = write_published(tmp_path / "such.pth", state, {**SETTINGS, "top_k": 3, "max_txt_len": 12})
    (tmp_path / "config.json").write_text(json.dumps({**project, "resume": str(path), "output_dir": str(tmp_path)}))
    words = ["train", "--config", str(tmp_path / "config.json")]
    assert main([*words, "--do_inference"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("is a published AdaCLIP checkpoint of epoch 4; of its settings these are others here") == 1
    assert "top_k        3 → 2" in printed and "such.pth" in printed
    assert main([*words, "--num_epochs", "1", "--learning_rate", "1e-30", "--weight_decay", "0"]) == 0
    (best,) = tmp_path.glob("tiny/*/best.safetensors")
    ours = to_our_names(state)
    for name, tensor in load_file(best).items():
        torch.testing.assert_close(tensor, ours[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("stored", "given", "expected"),
    [
        ({"clip_backbone": "ViT-B-32:laion2b_s34b_b79k"}, {}, {"clip_backbone": "ViT-B-32:laion2b_s34b_b79k"}),
        ({"clip_backbone": "ViT-B-32:laion2b_s34b_b79k"}, {"clip_backbone": "ViT-B/16"}, {"clip_backbone": "ViT-B/16"}),
        ({"clip_backbone": "ViT-B/32", "clip_weights": "HERE"}, {}, {"clip_weights": "HERE"}),
        ({"clip_backbone": "ViT-B/32", "clip_weights": "/gone"}, {}, {}),
        ({"clip_backbone": "ViT-B/32", "resume": "such.pth"}, {}, {}),
    ],
    ids=["its tag", "given is given", "its folder", "its folder is gone", "a default that nobody meant"],
)
def test_a_checkpoint_of_ours_knows_its_clip(
    stored: dict[str, str], given: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    """Shapes do not tell GELU from quick-GELU: the towers of LAION and OpenAI are alike in them."""
    here = {name: str(tmp_path) if value == "HERE" else value for name, value in stored.items()}
    save_file(CLIP, tmp_path / "a.safetensors", metadata={"format": "adaclip-finetune/1", "config": json.dumps(here)})
    found = with_its_clip(read_checkpoint(tmp_path / "a.safetensors"), load_config(None, given))
    chosen = {name: getattr(found, name) for name in found.model_fields_set}
    assert chosen == {name: str(tmp_path) if value == "HERE" else value for name, value in expected.items()}


@pytest.mark.parametrize("content", ["model", "adapter"])
def test_clip_weights_that_are_gone_are_named_where_the_checkpoint_cannot_do_without(
    content: str, tmp_path: Path
) -> None:
    """A file of ours from before checkpoints described their CLIP, and an adapter, which holds only some of it."""
    path, metadata = tmp_path / "a.safetensors", {"format": "adaclip-finetune/1", "content": content, "config": "{}"}
    save_file(CLIP, path, metadata=metadata)
    with pytest.raises(UserError, match=r"clip_weights /gone: there is no such .* --clip_weights"):
        with_its_clip(read_checkpoint(path), load_config(None, {"clip_weights": "/gone"}))
    described = json.dumps({"model_cfg": {}, "source": "/gone/clip.pt", "digest": "1234567890abcdef"})
    save_file(CLIP, path, metadata=metadata | {"clip": described, "config": json.dumps({"clip_weights": "/gone"})})
    if content == "adapter":
        with pytest.raises(UserError, match=r"clip_weights /gone: .* /gone/clip\.pt \(SHA-256 1234567890ab…\)"):
            with_its_clip(read_checkpoint(path), load_config())
    else:
        assert with_its_clip(read_checkpoint(path), load_config(None, {"clip_weights": "/gone"})).clip_weights is None
