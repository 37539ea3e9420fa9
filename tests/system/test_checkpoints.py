"""Checkpoints of whole retrievers: which kind they are, and what their tensors and settings demand; nothing runs."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import build_tiny_clip
from foreign import write_evil, write_published
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.training.checkpoint import save_tensors
from adaclip_finetune.training.session import open_model
from adaclip_finetune.weights import clip_weights
from adaclip_finetune.weights.checkpoints import (
    Checkpoint,
    Kind,
    describe,
    read_checkpoint,
    with_its_clip,
)
from adaclip_finetune.weights.clip_weights import Weights, load_clip, load_pretrained
from adaclip_finetune.weights.plain import weights_digest
from adaclip_finetune.weights.published import to_our_names, to_published_names

# The settings of the small models below, as a published config has them.
SETTINGS: dict[str, Any] = {"num_frm": 6, "top_k": 2, "policy_backbone": "raw", "rescale_size": 8, "frame_agg": "mlp"}
SETTINGS |= {"hidden_dim": 64, "mlp_hidden_dim": 32}
CLIP = {f"clip.{name}": tensor for name, tensor in build_tiny_clip(seed=5).state_dict().items()}
OURS = {"format": "adaclip-finetune/1"}


def random_state(**settings: Any) -> dict[str, Tensor]:
    """Return the tensors of a model with SETTINGS and these, under our names."""
    config = load_config(None, {**SETTINGS, **settings})
    towers = Weights({name.removeprefix("clip."): tensor for name, tensor in CLIP.items()}, "resume: x")
    return VideoRetriever(config, load_clip(config, from_checkpoint=towers)).state_dict()


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in found.items())


@pytest.mark.parametrize(("zipped", "prefix"), [(True, ""), (False, "module.")])
def test_a_published_checkpoint_is_read_without_easydict(tmp_path: Path, zipped: bool, prefix: str) -> None:
    ours = random_state()
    settings = {**SETTINGS, "peft": {"method": "bitfit", "config": {"keep_module_keywords": ["ln"]}}, "betas": [0.9, 1]}
    before = set(torch.serialization.get_safe_globals())
    named = {prefix + name: tensor for name, tensor in to_published_names(ours).items()}
    checkpoint = read_checkpoint(write_published(tmp_path / "such.pth", named, settings, zipped))
    assert "easydict" not in sys.modules
    assert set(torch.serialization.get_safe_globals()) == before
    assert (checkpoint.kind, checkpoint.epoch) == (Kind.PUBLISHED, "4")
    assert json.loads(json.dumps(checkpoint.settings)) == json.loads(json.dumps(settings))
    assert equal(checkpoint.state, ours)


def test_settings_of_the_model_that_differ_are_listed_with_both_values() -> None:
    stored = {**SETTINGS, "max_txt_len": 32, "frame_agg_temp": 0.5, "top_k": 3, "learning_rate": 1e-4, "freeze_clip": 0}
    stored |= {
        "unknown_here": 1,
        "betas": [0.9, 0.98],
        "output_dir": "/elsewhere",
        "peft": {"method": "ibs"},
        "tower": "file.json",
    }
    checkpoint = Checkpoint(Path("such.pth"), Kind.PUBLISHED, {}, stored, "4")
    first, *lines, flags = describe(checkpoint, load_config(None, SETTINGS)).splitlines()
    assert "such.pth is a published AdaCLIP checkpoint of epoch 4" in first
    assert {line.split()[0] for line in lines} == {"top_k", "frame_agg_temp", "max_txt_len", "peft.method"}
    assert "  frame_agg_temp is 1.0, there 0.5" in lines and "--frame_agg_temp 0.5" in flags
    adapter = Checkpoint(Path("a"), Kind.ADAPTER, {}, {"clip_weights": "/elsewhere/clip"}, "2")
    told = describe(adapter, load_config(None, {"clip_weights": "/here/clip"}))
    assert "clip_weights is /here/clip, there /elsewhere/clip" in told and "an adapter of ours of epoch 2" in told


@pytest.mark.parametrize(
    ("made_with", "given", "named"),
    [
        ({}, {"rescale_size": 9}, {"rescale_size": "8"}),
        ({"rnn": "bilstm"}, {"rnn": "lstm"}, {"rnn": "bilstm"}),
        ({"frame_agg": None}, {"frame_agg": "transformer"}, {"frame_agg": "none"}),
        ({"sim_header": "transformer"}, {"sim_header": "transformer", "top_k": 4}, {"top_k": "2"}),
        ({"use_policy": False}, {}, {"use_policy": "false"}),
        ({}, {"num_frm": 8, "mlp_type": "fc"}, {"num_frm": "6", "mlp_type": "mlp"}),
    ],
)
def test_settings_that_contradict_the_tensors_are_named_with_the_way_out(
    made_with: dict[str, Any], given: dict[str, Any], named: dict[str, str]
) -> None:
    stored = {"use_policy": True, "rnn": "transformer", "mlp_type": "mlp", **SETTINGS, **made_with}
    checkpoint = Checkpoint(Path("such.pth"), Kind.PUBLISHED, random_state(**made_with), stored)
    with pytest.raises(UserError, match=r"such\.pth does not fit the model") as refused:
        open_model(load_config(None, {**SETTINGS, **given}), checkpoint)
    last = str(refused.value).splitlines()[-1]
    for name, there in named.items():
        assert f"--{name} {there}" in last and f", there {there}" in str(refused.value)
    # The way out in the message works.
    flags = dict(word.split() for word in last.partition(": --")[2].split(" --"))
    values = {"none": None, "true": True, "false": False}
    repaired = {n: values[v] if v in values else int(v) if v.isdecimal() else v for n, v in flags.items()}
    open_model(load_config(None, {**SETTINGS, **given, **repaired}), checkpoint)


def test_a_checkpoint_that_lacks_a_tensor_is_refused() -> None:
    for lacking in ("selector.scorer.0.weight", "selector.scorer.0.bias"):
        state = {name: tensor for name, tensor in random_state().items() if name != lacking}
        with pytest.raises(UserError, match=rf"(?s)such\.pth .*{lacking}"):
            open_model(load_config(None, SETTINGS), Checkpoint(Path("such.pth"), Kind.PUBLISHED, state, SETTINGS))


@pytest.mark.parametrize("tower", ["change", "proxy_tokens", "global_local"])
def test_a_tower_that_a_checkpoint_lacks_begins_untrained(tower: str) -> None:
    """A run may go on with another tower; to evaluate it, its parameters must be there."""
    config = load_config(None, {**SETTINGS, "frame_agg": None, "tower": {"method": tower}, "peft": {"method": "full"}})
    plain = random_state(frame_agg=None)
    checkpoint = Checkpoint(Path("such.pth"), Kind.PUBLISHED, plain)
    found = open_model(config, checkpoint).model.state_dict()
    new = {name: tensor for name, tensor in found.items() if name.startswith("tower.")}
    assert new and equal({name: tensor for name, tensor in found.items() if name not in new}, plain)
    if tower == "change":
        assert all(tensor.eq(0).all() for tensor in new.values()), "the mean of frames, as the checkpoint has it"
    with pytest.raises(UserError, match=r"missing: tower\."):
        open_model(config, checkpoint, learn=False)


def test_the_clip_that_a_checkpoint_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, SETTINGS)
    tiny = load_clip(config, from_checkpoint=Checkpoint(Path("such.pth"), Kind.PUBLISHED, dict(CLIP)).towers())
    with pytest.raises(UserError, match="give clip_weights"):
        load_pretrained(config, tiny)
    asked: list[str] = []
    monkeypatch.setattr(clip_weights, "load_clip", lambda config: asked.append(config.clip_backbone) or tiny)
    model_cfg = open_clip.get_model_config("ViT-B-32-quickgelu")
    assert load_pretrained(config, replace(tiny, description={"model_cfg": model_cfg})) is tiny
    load_pretrained(load_config(None, {"clip_backbone": "RN50:cc12m"}), tiny)
    load_pretrained(config, replace(tiny, description={"pretrained": "RN50:yfcc15m"}))
    assert asked == ["ViT-B/32", "RN50:cc12m", "RN50:yfcc15m"]
    # A CLIP of the same shapes may not be the one that the checkpoint began with.
    about = {"model_cfg": model_cfg, "source": "/theirs/clip.pt", "digest": weights_digest(tiny.module)}
    assert load_pretrained(config, replace(tiny, description=about)) is tiny
    with pytest.raises(UserError, match=r"/theirs/clip\.pt .*clip_weights"):
        load_pretrained(config, replace(tiny, description=about | {"digest": "0" * 64}))


@pytest.mark.parametrize(("header", "prefix"), [("meanP", ""), ("seqTransf", "_orig_mod.")])
def test_a_state_dict_without_settings_is_loaded(tmp_path: Path, header: str, prefix: str) -> None:
    """CLIP4Clip's checkpoints are such files."""
    config = load_config(None, {"num_frm": 12, "use_policy": False, "sim_header": header})
    state = to_published_names(random_state(num_frm=12, use_policy=False, sim_header=header, frame_agg=None))
    path = tmp_path / "pytorch_model.bin.4"
    torch.save({prefix + name: tensor for name, tensor in state.items()}, path)
    checkpoint = read_checkpoint(path)
    assert equal(open_model(config, checkpoint).model.state_dict(), to_our_names(state))
    with pytest.raises(UserError, match=r"(?s)missing: aggregator.*holds no settings"):
        open_model(config.model_copy(update={"frame_agg": "mlp"}), checkpoint)


def test_an_adapter_is_laid_over_the_pretrained_clip(project: dict[str, Any], tmp_path: Path) -> None:
    """It leaves out the frozen copy of the image tower in the selector, too."""
    config = load_config(None, {**project, "policy_backbone": "frozen_clip"})
    pretrained = VideoRetriever(config, load_clip(config)).state_dict()
    adapter = {
        name: tensor + 1
        for name, tensor in pretrained.items()
        if not name.startswith("selector.backbone.") and (name.endswith("bias") or not name.startswith("clip."))
    }
    path, metadata = tmp_path / "adapter.safetensors", {"content": "adapter", "config": config.model_dump_json()}
    save_tensors(path, adapter, metadata)
    checkpoint = read_checkpoint(path)
    assert checkpoint.towers() is None
    assert equal(open_model(config, checkpoint).model.state_dict(), pretrained | adapter)
    without = {name: tensor for name, tensor in adapter.items() if name != "selector.scorer.0.bias"}
    save_tensors(path, without | {"clip.extra": torch.zeros(2)}, metadata)
    with pytest.raises(UserError, match=r"clip\.extra"):
        open_model(config, read_checkpoint(path))
    save_tensors(path, without, metadata)
    with pytest.raises(UserError, match=r"missing: selector\.scorer\.0\.bias"):
        open_model(config, read_checkpoint(path))


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ({"epoch": 3, "optimizer_state_dict": {}, "loss": 0.5}, "holds no tensors by name"),
        ({"a": torch.zeros(2)}, r"holds no clip\.logit_scale"),
        ({n.removeprefix("clip."): t for n, t in CLIP.items()}, "CLIP weights alone belong into clip_weights"),
        ({**CLIP, "cross.layer.weight": torch.zeros(2)}, r"no.* has tensors of these names: cross\.layer\.weight"),
    ],
)
def test_a_file_of_no_known_kind_is_told_the_known_ones(tmp_path: Path, content: Any, facts: str) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match=facts) as refused:
        read_checkpoint(tmp_path / "file.pth")
    for kind in ("adapter.safetensors", "CLIP4Clip", "CLIP-ViP", "CenterCLIP", "DGL"):
        assert kind in str(refused.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write_evil(tmp_path / "evil.pth", tmp_path / "canary", {"arch": "x", "state_dict": CLIP}, "zip")
    save_file(CLIP, tmp_path / "list.safetensors", metadata={**OURS, "config": "[1]"})
    for path, facts in (
        (tmp_path / "evil.pth", "nothing in it was run"),
        (tmp_path / "list.safetensors", "config in its metadata"),
        (tmp_path, "folder.*best.safetensors"),
    ):
        with pytest.raises(UserError, match=f"resume: {path}.*{facts}"):
            read_checkpoint(path)
    assert not (tmp_path / "canary").exists()


def test_a_run_begins_with_a_published_checkpoint(project: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    ours = random_state()
    path = write_published(tmp_path / "such.pth", to_published_names(ours), {**SETTINGS, "top_k": 3, "max_txt_len": 12})
    (tmp_path / "config.json").write_text(json.dumps({**project, "resume": str(path), "output_dir": str(tmp_path)}))
    words = ["--num_epochs", "1", "--learning_rate", "1e-30", "--weight_decay", "0"]
    assert main(["train", "--config", str(tmp_path / "config.json"), *words]) == 0
    printed = capsys.readouterr().out
    assert printed.count("is a published AdaCLIP checkpoint of epoch 4") == 1
    assert "top_k is 2, there 3" in printed and "such.pth" in printed
    (best,) = tmp_path.glob("tiny/*/best.safetensors")
    for name, tensor in load_file(best).items():
        torch.testing.assert_close(tensor, ours[name], rtol=0, atol=1e-6)


LAION, HERE = "ViT-B-32:laion2b_s34b_b79k", __file__


@pytest.mark.parametrize("content", ["model", "adapter"])
@pytest.mark.parametrize(
    ("stored", "given", "expected"),
    [
        ({"clip_backbone": LAION}, {}, {"clip_backbone": LAION}),
        ({"clip_backbone": LAION}, {"clip_backbone": "ViT-B/16"}, {"clip_backbone": "ViT-B/16"}),
        ({"clip_backbone": LAION}, {"clip_weights": HERE}, {"clip_weights": HERE}),
        ({"clip_backbone": "ViT-B/32", "clip_weights": HERE}, {}, {"clip_weights": HERE}),
        ({"clip_backbone": "ViT-B/32", "resume": "such.pth"}, {}, {}),
    ],
    ids=["its tag", "a given backbone", "given weights", "its folder", "a default that nobody chose"],
)
def test_a_checkpoint_brings_the_settings_of_its_clip(
    content: str, stored: dict[str, str], given: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    """Shapes do not tell GELU from quick-GELU: the towers of LAION and OpenAI have the same."""
    path = tmp_path / "a.safetensors"
    save_file(CLIP, path, metadata={**OURS, "content": content, "config": json.dumps(stored)})
    found = with_its_clip(read_checkpoint(path), load_config(None, given))
    assert {name: getattr(found, name) for name in found.model_fields_set} == expected


def test_clip_weights_that_are_gone_are_named_where_the_checkpoint_needs_them(tmp_path: Path) -> None:
    """An adapter holds only a part of CLIP; a whole checkpoint describes its own."""
    path, described = tmp_path / "a.safetensors", {"source": "/gone/clip.pt"}
    metadata = {**OURS, "config": json.dumps({"clip_weights": "/gone"}), "clip": json.dumps(described)}
    for config in (load_config(None, {"clip_weights": "/gone"}), load_config(None, {})):
        save_file(CLIP, path, metadata={**metadata, "content": "adapter"})
        with pytest.raises(UserError, match=r"clip_weights /gone: .*/gone/clip\.pt.* --clip_weights"):
            with_its_clip(read_checkpoint(path), config)
        save_file(CLIP, path, metadata={**metadata, "content": "model"})
        assert with_its_clip(read_checkpoint(path), config).clip_weights is None
