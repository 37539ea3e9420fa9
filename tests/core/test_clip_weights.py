"""CLIP by tag, folder and file: strict, in float32, and without running what a file holds."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from foreign import write_evil
from open_clip import factory, pretrained
from safetensors.torch import save_file
from torch import Tensor

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.weights.clip_weights import load_clip, resolve_backbone

ARCHITECTURE: dict[str, Any] = {"embed_dim": 32, "quick_gelu": True}
ARCHITECTURE["vision_cfg"] = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
ARCHITECTURE["text_cfg"] = {"width": 8, "heads": 1, "layers": 1}
GREY = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear", "resize_mode": "squash"}
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def tiny_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """open_clip has an architecture `tiny` with one tag, `grey`, and there is no network."""

    def no_network(*_: Any, **__: Any) -> str:
        raise OSError("Network is unreachable")

    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", ARCHITECTURE)
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {"grey": {"hf_hub": "nobody/nothing/", **GREY}})
    monkeypatch.setattr(pretrained, "hf_hub_download", no_network)


def config(**settings: Any) -> Config:
    return load_config(None, {"clip_backbone": "tiny", **settings})


def random_state(dtype: torch.dtype = torch.float32) -> State:
    """Random weights for `tiny`."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = open_clip.CLIP(**ARCHITECTURE).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in shapes.items()}


def write_folder(folder: Path, model: dict[str, Any] | None = None, **preprocess: Any) -> Path:
    folder.mkdir()
    content = {"model_cfg": model or ARCHITECTURE, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(random_state(torch.float16), folder / "open_clip_model.safetensors")
    return folder


def test_a_folder_brings_architecture_weights_and_preprocessing(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", **GREY)
    loaded = load_clip(load_config(None, {"clip_weights": str(folder)}))
    expected = random_state(torch.float16)
    for name, tensor in loaded.module.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].float()), name
    assert (loaded.image.size, loaded.image.mean, loaded.image.interpolation) == (32, (0.5, 0.5, 0.5), "bilinear")
    assert loaded.image.resize_mode == "squash"
    assert loaded.source == str(folder / "open_clip_model.safetensors")
    assert loaded.context_length == 77
    assert "QuickGELU" in repr(loaded.module)


WRAPPERS: dict[str, Callable[[State], dict[str, Any]]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "torch.compile of a tower": lambda state: {n.replace("visual.", "visual._orig_mod."): t for n, t in state.items()},
    "Lightning": lambda state: {"state_dict": {f"model.{name}": t for name, t in state.items()}, "epoch": 3},
    "all": lambda state: {"model": {f"module._orig_mod.model.{name}": tensor for name, tensor in state.items()}},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_known_wrappers_are_taken_off_and_nothing_is_rounded(tmp_path: Path, wrapper: str) -> None:
    """The published system loaded CLIP weights through float16. Here float32 stays bit for bit."""
    expected = random_state()
    assert any(not torch.equal(tensor, tensor.half().float()) for tensor in expected.values())
    content = WRAPPERS[wrapper](expected)
    torch.save(content, tmp_path / "weights.pt")
    named = next((value for value in content.values() if isinstance(value, dict)), content)
    save_file(named, tmp_path / "weights.safetensors")
    for suffix in ("pt", "safetensors"):
        loaded = load_clip(config(clip_weights=str(tmp_path / f"weights.{suffix}")))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.module.state_dict().items())
        assert loaded.image.mean == (0.5, 0.5, 0.5), "a file is preprocessed for as the tags of its architecture are"


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


def test_a_tag_that_does_not_fit_or_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)tiny:grey.*Network is unreachable.*HF_ENDPOINT.*clip_weights"):
        load_clip(config())
    state = random_state()
    del state["visual.proj"]
    save_file({**state, "extra": torch.zeros(2)}, tmp_path / "fetched.safetensors")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: str(tmp_path / "fetched.safetensors"))
    with pytest.raises(UserError, match=r"(?s)tiny:grey.*visual\.proj.*extra"):
        load_clip(config())


def test_names_and_tags() -> None:
    for name in ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-B-32:openai"):
        quick = f"{name.replace('/', '-').removesuffix(':openai')}-quickgelu"
        assert resolve_backbone(name) == (quick, "openai")
    assert resolve_backbone("tiny") == ("tiny", None)
    assert resolve_backbone("ViT-B/32:laion2b_s34b_b79k") == ("ViT-B-32", "laion2b_s34b_b79k")
    # Weights that were trained with quick-GELU always get it.
    tags = [(n, t) for n, tags in pretrained._PRETRAINED.items() for t, cfg in tags.items() if cfg.get("quick_gelu")]
    assert len(tags) > 40
    for name, tag in tags:
        assert open_clip.get_model_config(resolve_backbone(f"{name}:{tag}")[0])["quick_gelu"], (name, tag)


@pytest.mark.parametrize(
    ("backbone", "facts"),
    [
        ("ViT-B/33", "'ViT-B-33'.*ViT-B/32"),
        ("ViT-B-32:nonsense", "'nonsense'.*openai, laion400m"),
        ("ViT-B-32", "ViT-B-32:TAG.*openai.*clip_weights"),
        ("ViT-S-32", "set clip_weights"),
        ("hf-hub:org/repo", "'hf-hub'"),
    ],
)
def test_names_that_open_clip_does_not_know(backbone: str, facts: str) -> None:
    with pytest.raises(UserError, match=f"^clip_backbone: .*{facts}"):
        load_clip(config(clip_backbone=backbone))


def test_all_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    """The published system showed such mismatches only in its debug log."""
    state = random_state()
    state["visual.extra"] = torch.zeros(3)
    del state["ln_final.bias"]
    state["visual.proj"] = state["visual.proj"][:, :16].contiguous()
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    with pytest.raises(UserError) as refused:
        load_clip(config(clip_weights=str(path)))
    first, *lines = str(refused.value).splitlines()
    assert first.startswith(f"clip_weights: {path} with clip_backbone tiny")
    assert sorted(lines) == [
        "  missing: ln_final.bias (8,)",
        "  shape: visual.proj is (64, 16), the model has (64, 32)",
        "  unexpected: visual.extra (3,)",
    ]


def test_settings_that_do_not_fit_are_refused_before_weights_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: pytest.fail("fetched"))
    with pytest.raises(UserError, match=r"max_img_size: 224.* 32"):
        load_clip(config(max_img_size=224))
    with pytest.raises(UserError, match=r"max_txt_len: 78.* 77 tokens"):
        load_clip(config(max_txt_len=78))
    assert load_clip(config(max_img_size=32, max_txt_len=77), with_weights=False).image.size == 32
    stretched = load_clip(config(resize="stretch"), with_weights=False)
    assert stretched.image.resize_mode == stretched.description["preprocess"]["resize_mode"] == "squash"


def test_a_backbone_that_contradicts_the_folder(tmp_path: Path) -> None:
    # A description that spells out defaults is still the same architecture.
    spelled_out = {**ARCHITECTURE, "custom_text": False, "text_cfg": {**ARCHITECTURE["text_cfg"], "vocab_size": 49408}}
    load_clip(config(clip_weights=str(write_folder(tmp_path / "same", spelled_out))))
    other = str(write_folder(tmp_path / "other", {**ARCHITECTURE, "quick_gelu": False}))
    with pytest.raises(UserError, match=f"clip_backbone tiny .*{other}"):
        load_clip(config(clip_weights=other))


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ("{", "open_clip_config.json"),
        ("[]", "model_cfg"),
        ('{"model_cfg": {}}', "clip_weights: .*folder"),
        ('{"model_cfg": {"vision_cfg": {"nonsense": 1}, "text_cfg": {}}}', "clip_weights: .*folder"),
        ({"resize_mode": "longest"}, "clip_weights: .*folder"),
        ({"interpolation": "random"}, "clip_weights: .*folder"),
        ({"mean": 0.5}, "clip_weights: .*folder"),
        ("no weights", "folder holds no .*open_clip_model.safetensors"),
        (None, "folder holds no open_clip_config.json and no config.json"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, content: Any, facts: str) -> None:
    folder = write_folder(tmp_path / "folder", **(content if isinstance(content, dict) else {}))
    if content is None:
        (folder / "open_clip_config.json").unlink()
    elif content == "no weights":
        (folder / "open_clip_model.safetensors").unlink()
    elif isinstance(content, str):
        (folder / "open_clip_config.json").write_text(content)
    with pytest.raises(UserError, match=facts):
        load_clip(load_config(None, {"clip_weights": str(folder)}))


@pytest.mark.parametrize("how", ["zip", "old", "2", "4"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path: Path, how: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "weights.pt"
    write_evil(path, canary, random_state(), how)
    with pytest.raises(UserError, match=f"{path} .*nothing in it was run") as refused:
        load_clip(config(clip_weights=str(path)))
    assert not canary.exists()
    assert "weights_only" not in str(refused.value), "torch's advice to run the file all the same"
    pickle.loads(path.read_bytes()) if how.isdecimal() else torch.load(path, weights_only=False)
    assert canary.exists(), "the file was harmless: the test shows nothing"


def saved(content: Any, share: float = 1) -> Callable[[Path], bytes]:
    """Return what a file of weights holds, from its beginning to a share of its size."""

    def file_of(path: Path) -> bytes:
        save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
        return path.read_bytes()[: int(share * path.stat().st_size)]

    return file_of


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("junk.pt", b"\x08not weights" * 50, "not a file of weights"),
        ("junk.safetensors", b"\x08not weights" * 50, "cannot be read .*header"),
        ("header.pt", b"\x02\0\0\0\0\0\0\0{]", "cannot be read .*header"),
        ("numbers.pt", saved({"a": 1}), "no tensors"),
        ("tensor.pt", saved(torch.zeros(3)), "no tensors"),
        ("empty.safetensors", b"", "incomplete"),
        ("empty.pt", b"", "incomplete"),
        ("pointer.safetensors", POINTER, "Git LFS pointer.*git lfs pull"),
        ("pointer.pt", POINTER, "Git LFS pointer.*git lfs pull"),
        ("page.bin", b"\n<!DOCTYPE html><html>404</html>", "web page"),
        ("half.safetensors", saved(random_state(), 0.5), "incomplete"),
        ("half.pt", saved(random_state(), 0.5), "incomplete"),
        ("absent.safetensors", None, "No such file"),
    ],
)
def test_files_that_are_not_weights_are_called_what_they_are(
    tmp_path: Path, name: str, content: Any, facts: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content(path) if callable(content) else content)
    with pytest.raises(UserError, match=f"{name} .*{facts}"):
        load_clip(config(clip_weights=str(path)))


def test_random_values_need_not_be_drawn_for_weights_that_are_filled_in(tmp_path: Path) -> None:
    settings, before = config(clip_weights=str(write_folder(tmp_path / "clip"))), torch.get_rng_state()
    state = load_clip(settings, draw=False).module.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in load_clip(settings).module.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert not torch.equal(torch.get_rng_state(), before)


def test_without_weights_nothing_is_fetched_and_nothing_allocated() -> None:
    loaded = load_clip(load_config(None, {"clip_backbone": "ViT-B/32"}), with_weights=False)
    assert sum(parameter.numel() for parameter in loaded.module.parameters()) == 151_277_313
    assert all(tensor.is_meta for tensor in [*loaded.module.parameters(), *loaded.module.buffers()])
    assert loaded.image.size == 224 and loaded.context_length == 77
