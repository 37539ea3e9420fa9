"""Where the towers come from: tags, folders, files; strict, in float32, without running what a file holds."""

import json
import logging
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from foreign import write_evil, write_jit
from open_clip import factory, pretrained
from safetensors.torch import save_file
from torch import Tensor

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.weights.backbones import resolve_backbone
from adaclip_finetune.weights.clip_weights import load_clip, read_state_dict, strict_load

ARCHITECTURE = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {"width": 64, "heads": 1, "layers": 1},
}
GREY = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear", "resize_mode": "squash"}
UNREACHABLE = {"hf_hub": "nobody/nothing/", **GREY}


@pytest.fixture(autouse=True)
def tiny_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """open_clip knows an architecture `tiny` with one tag, `grey`; and there is no network."""

    def no_network(*_: Any, **__: Any) -> str:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    path = tmp_path / "architecture" / "tiny.json"
    path.parent.mkdir()
    path.write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(path)
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {"grey": UNREACHABLE})
    monkeypatch.setattr(pretrained, "hf_hub_download", no_network)


def config(**settings: Any) -> Config:
    return load_config(None, {"clip_backbone": "tiny", **settings})


def random_state(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights for `tiny`."""
    generator = torch.Generator().manual_seed(seed)
    module = open_clip.CLIP(**ARCHITECTURE)
    return {k: torch.randn(v.shape, generator=generator).to(dtype) for k, v in module.state_dict().items()}


def write_folder(folder: Path, model: dict[str, Any] | None = None, **preprocess: Any) -> Path:
    folder.mkdir()
    content = {"model_cfg": model or ARCHITECTURE, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(random_state(dtype=torch.float16), folder / "open_clip_model.safetensors")
    return folder


def test_a_folder_brings_architecture_weights_and_preprocessing(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", **GREY)
    loaded = load_clip(load_config(None, {"clip_weights": str(folder)}))
    expected = random_state(dtype=torch.float16)
    for name, tensor in loaded.module.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].float()), name
    assert (loaded.image.size, loaded.image.mean, loaded.image.interpolation) == (32, (0.5, 0.5, 0.5), "bilinear")
    assert loaded.image.resize_mode == "squash"
    assert loaded.source == str(folder / "open_clip_model.safetensors")
    assert loaded.context_length == 77
    assert "QuickGELU" in repr(loaded.module)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("wrapped", ["plain", "state_dict", "module."])
def test_fault_weights_are_not_rounded_on_loading(tmp_path: Path, suffix: str, wrapped: str) -> None:
    """A fault of the published system: CLIP weights went through float16. Here float32 stays bit for bit."""
    expected = random_state()
    assert any(not torch.equal(tensor, tensor.half().float()) for tensor in expected.values())
    path = tmp_path / f"weights{suffix}"
    state: dict[str, Any] = {f"module.{k}": v for k, v in expected.items()} if wrapped == "module." else expected
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if wrapped == "state_dict" else OrderedDict(state), path)
    loaded = load_clip(config(clip_weights=str(path)))
    for name, tensor in loaded.module.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name


def test_a_tag_is_fetched_and_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "fetched.safetensors"
    save_file(random_state(), path)
    asked: list[Any] = []
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: asked.append(cfg) or str(path))
    for backbone in ("tiny", "tiny:grey"):
        loaded = load_clip(config(clip_backbone=backbone))
        assert asked.pop()["hf_hub"] == "nobody/nothing/"
        assert loaded.source == "tiny:grey"
        assert loaded.image.mean == (0.5, 0.5, 0.5) and loaded.image.resize_mode == "squash"
        assert torch.equal(loaded.module.visual.proj, random_state()["visual.proj"])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_tag_may_bring_an_archive_of_openai(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_jit(tmp_path / "tiny.pt", random_state())
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: str(tmp_path / "tiny.pt"))
    loaded = load_clip(config())
    assert torch.equal(loaded.module.visual.proj, random_state()["visual.proj"].half().float())


def test_a_tag_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = random_state()
    del state["visual.proj"]
    save_file({**state, "extra": torch.zeros(2)}, tmp_path / "fetched.safetensors")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: str(tmp_path / "fetched.safetensors"))
    with pytest.raises(UserError, match=r"(?s)tiny:grey.*visual\.proj.*extra"):
        load_clip(config())


def test_a_file_is_prepared_for_as_the_tags_of_its_architecture_are(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(random_state(), path)
    for backbone in ("tiny", "tiny:grey"):
        assert load_clip(config(clip_backbone=backbone, clip_weights=str(path))).image.mean == (0.5, 0.5, 0.5)


def test_fault_state_dict_mismatches_shown_only_in_debug(tmp_path: Path) -> None:
    """Every tensor that does not fit is listed, and nothing is loaded."""
    state = random_state()
    state["visual.extra"] = torch.zeros(3)
    state["another"] = torch.zeros(())
    del state["ln_final.bias"], state["text_projection"]
    state["visual.proj"] = state["visual.proj"][:, :16].contiguous()
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    with pytest.raises(UserError) as refused:
        load_clip(config(clip_weights=str(path)))
    lines = str(refused.value).splitlines()
    assert lines[0] == f"clip_weights: {path} does not fit the model (5 tensors):"
    assert sorted(lines[1:]) == [
        "  missing: ln_final.bias (64,)",
        "  missing: text_projection (64, 32)",
        "  shape: visual.proj is (64, 16), the model has (64, 32)",
        "  unexpected: another ()",
        "  unexpected: visual.extra (3,)",
    ]


def test_what_is_refused_changes_nothing() -> None:
    module = open_clip.CLIP(**ARCHITECTURE)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = random_state()
    del state["ln_final.bias"]
    with pytest.raises(UserError):
        strict_load(module, state, "x")
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("error", [OSError("Network is unreachable"), RuntimeError("checksum"), KeyError("x")])
def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(pretrained, "hf_hub_download", fail)
    with pytest.raises(UserError, match=r"(?s)weights tiny:grey could not be had.*HF_ENDPOINT.*clip_weights"):
        load_clip(config())


@pytest.mark.parametrize("how", ["zip", "old", "2", "4"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path: Path, how: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "weights.pt"
    write_evil(path, canary, random_state(), how)
    with pytest.raises(UserError, match=f"{path}: is no state dict") as refused:
        load_clip(config(clip_weights=str(path)))
    assert not canary.exists()
    assert "weights_only" not in str(refused.value), "advice to run the file all the same"
    pickle.loads(path.read_bytes()) if how.isdecimal() else torch.load(path, weights_only=False)
    assert canary.exists(), "the file was harmless: the test shows nothing"


@pytest.mark.parametrize(
    "content",
    [[1, 2], {}, {"a": 1}, torch.zeros(3), {"state_dict": {}}, "text"],
    ids=lambda content: repr(content)[:20],
)
def test_files_without_named_tensors(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"weights\.pt"):
        read_state_dict(path)


@pytest.mark.parametrize(
    "name", ["weights.pt", "weights.safetensors", "weights.npz", "absent.safetensors", "absent.pt"]
)
def test_files_that_are_no_weights(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if not name.startswith("absent"):
        path.write_bytes(b"\x08not weights" * 50)
    with pytest.raises(UserError, match=name):
        load_clip(config(clip_weights=str(path)))


def test_the_three_names_of_openai_are_quick_gelu_with_their_weights() -> None:
    expected = {"ViT-B/32": "ViT-B-32-quickgelu", "ViT-B/16": "ViT-B-16-quickgelu", "ViT-L/14": "ViT-L-14-quickgelu"}
    for given, name in expected.items():
        assert resolve_backbone(given) == (name, "openai")
        assert open_clip.get_model_config(name)["quick_gelu"] is True
        assert open_clip.get_pretrained_cfg(name, "openai")["quick_gelu"] is True


def test_names_and_tags() -> None:
    assert resolve_backbone("tiny") == ("tiny", None)
    assert resolve_backbone("ViT-B/32:laion2b_s34b_b79k") == ("ViT-B-32", "laion2b_s34b_b79k")
    assert resolve_backbone("ViT-B-32:laion2b-s34b-b79k") == ("ViT-B-32", "laion2b-s34b-b79k")
    assert resolve_backbone("ViT-B-32:openai") == ("ViT-B-32-quickgelu", "openai")


def test_weights_trained_with_quick_gelu_always_get_it() -> None:
    quick = [(n, t) for n, tags in pretrained._PRETRAINED.items() for t, cfg in tags.items() if cfg.get("quick_gelu")]
    assert len(quick) > 40
    for name, tag in quick:
        assert open_clip.get_model_config(resolve_backbone(f"{name}:{tag}")[0])["quick_gelu"], (name, tag)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("ViT-B/33", "open_clip has no model 'ViT-B-33'; OpenAI's are ViT-B/32"),
        ("ViT-B-32:nonsense", "no weights 'nonsense' of ViT-B-32; it has openai, laion400m"),
        ("ViT-B-32", "does not say which weights; write ViT-B-32:TAG"),
        ("ViT-S-32", "there are none: set clip_weights"),
        ("hf-hub:org/repo", "no model 'hf-hub'"),
    ],
)
def test_names_that_open_clip_does_not_know(backbone: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^clip_backbone: .*{message}"):
        load_clip(config(clip_backbone=backbone))


def test_settings_that_do_not_fit_are_refused_before_weights_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: pytest.fail("fetched"))
    with pytest.raises(UserError, match=r"max_img_size: 224 .* \(32x32\)"):
        load_clip(config(max_img_size=224))
    with pytest.raises(UserError, match=r"max_txt_len: 78 is beyond .* 77 tokens"):
        load_clip(config(max_txt_len=78))
    assert load_clip(config(max_img_size=32, max_txt_len=77), with_weights=False).image.size == 32


def test_a_backbone_that_contradicts_the_folder(tmp_path: Path) -> None:
    # Spelled out, defaults are the same architecture still.
    spelled_out = {**ARCHITECTURE, "custom_text": False, "text_cfg": {**ARCHITECTURE["text_cfg"], "vocab_size": 49408}}
    folder = str(write_folder(tmp_path / "same", spelled_out))
    assert load_clip(config(clip_weights=folder)).image.size == 32
    with pytest.raises(UserError, match=r"clip_backbone ViT-B/32 is not the architecture in .*open_clip_config\.json"):
        load_clip(config(clip_backbone="ViT-B/32", clip_weights=folder))
    other = write_folder(tmp_path / "other", {**ARCHITECTURE, "quick_gelu": False})
    with pytest.raises(UserError, match="clip_backbone tiny is not the architecture"):
        load_clip(config(clip_weights=str(other)))


@pytest.mark.parametrize("clip_backbone", [None, "tiny"])
@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"model_cfg": {}}',
        '{"model_cfg": {"embed_dim": 32, "vision_cfg": {"nonsense": 1}, "text_cfg": {}}}',
        '{"model_cfg": {"embed_dim": "x", "vision_cfg": {}, "text_cfg": {}}}',
    ],
)
def test_folders_with_a_broken_config(tmp_path: Path, content: str, clip_backbone: str | None) -> None:
    folder = write_folder(tmp_path / "folder")
    (folder / "open_clip_config.json").write_text(content)
    given = {"clip_backbone": clip_backbone} if clip_backbone else {}
    with pytest.raises(UserError, match="folder"):
        load_clip(load_config(None, {"clip_weights": str(folder), **given}))


def test_folders_that_lack_something(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder")
    (folder / "open_clip_model.safetensors").unlink()
    settings = load_config(None, {"clip_weights": str(folder)})
    with pytest.raises(UserError, match=r"holds no weights, such as open_clip_model\.safetensors"):
        load_clip(settings)
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match=r"holds no open_clip_config\.json"):
        load_clip(settings)


@pytest.mark.parametrize("preprocess", [{"resize_mode": "longest"}, {"interpolation": "random"}, {"mean": 0.5}])
def test_preprocessing_that_is_not_ours_is_refused(tmp_path: Path, preprocess: dict[str, Any]) -> None:
    folder = write_folder(tmp_path / "folder", **preprocess)
    with pytest.raises(UserError, match="cannot build"):
        load_clip(load_config(None, {"clip_weights": str(folder)}))


def test_without_weights_nothing_is_fetched_and_nothing_allocated() -> None:
    loaded = load_clip(load_config(None, {"clip_backbone": "ViT-B/32"}), with_weights=False)
    assert sum(parameter.numel() for parameter in loaded.module.parameters()) == 151_277_313
    assert all(tensor.is_meta for tensor in [*loaded.module.parameters(), *loaded.module.buffers()])
    assert loaded.image.size == 224 and loaded.context_length == 77


def test_what_open_clip_says_stays_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_clip.create_model("tiny", load_weights=False)
    assert "No pretrained weights loaded" in caplog.text, "open_clip no longer says it: the silence can go"
    caplog.clear()
    folder = write_folder(tmp_path / "folder")
    root = logging.getLogger()
    level, filters = root.level, list(root.filters)
    for with_weights in (True, False):
        load_clip(load_config(None, {"clip_weights": str(folder)}), with_weights)
    assert caplog.records == []
    monkeypatch.setattr(root, "handlers", [])
    load_clip(load_config(None, {"clip_weights": str(folder)}))
    assert (root.handlers, root.level, root.filters) == ([], level, filters)


def test_tokens_of_the_tower(tmp_path: Path) -> None:
    loaded = load_clip(config(), with_weights=False)
    words = ["one", "two three four five"]
    assert torch.equal(loaded.tokenize(words, 8), open_clip.tokenize(words, 8))
    assert loaded.tokenize(words, 4)[1].tolist() == [*open_clip.tokenize(words[1])[0, :3].tolist(), 49407]
    assert loaded.count_cut(words, 5) == 1 and loaded.count_cut(words, 6) == 0
