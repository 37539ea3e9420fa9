"""One set of CLIP weights, written in every format of other systems, loads as the same towers."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import build_tiny_clip
from foreign import NUMBERS, Evil, write_jit, write_published
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.weights.clip_weights import architecture_of, load_clip, same_architecture
from adaclip_finetune.weights.huggingface import to_huggingface_names
from adaclip_finetune.weights.loaded import LoadedClip

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = open_clip.tokenize(["a dog", "two red cars run fast", ""])
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Return weights that float16 holds exactly."""
    return {name: tensor.half().float() for name, tensor in build_tiny_clip(seed=3).state_dict().items()}


def write_huggingface(folder: Path, state: State, as_bin: bool = False) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=sizes, projection_dim=64))
    theirs = to_huggingface_names(state)
    assert theirs is not None
    model.load_state_dict(theirs, strict=True)
    model.save_pretrained(folder)
    if as_bin:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()


WRITERS: dict[str, Callable[[Path, State], object]] = {
    "openai-jit.pt": write_jit,
    "openai.pt": lambda path, state: torch.save({n: t.half() for n, t in state.items()} | NUMBERS, path),
    "open_clip.pt": lambda path, state: torch.save({"epoch": 3, "name": "x", "state_dict": state}, path),
    "open_clip.safetensors": lambda path, state: save_file(state, path),
    "huggingface": write_huggingface,
    "huggingface-bin": lambda path, state: write_huggingface(path, state, as_bin=True),
}


def load(path: Path, **settings: Any) -> LoadedClip:
    return load_clip(load_config(None, {"clip_weights": str(path), **settings}))


def embeddings(module: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return module.eval().encode_image(PIXELS), module.encode_text(TOKENS)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_the_same_weights_are_the_same_towers(state: State, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, state)
    loaded = load(path)
    assert loaded.module.state_dict().keys() == state.keys()
    for key, tensor in loaded.module.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, state[key]), key
    oracle = build_tiny_clip()
    oracle.load_state_dict(state)
    torch.testing.assert_close(embeddings(loaded.module), embeddings(oracle), rtol=0, atol=0)
    assert (loaded.image.size, loaded.image.mean[0], loaded.context_length) == (32, 0.48145466, 77)
    assert torch.equal(loaded.tokenize(["a dog"], 8), TOKENS[:1, :8])
    assert str(path) in loaded.source


def change(path: Path, **values: Any) -> None:
    """Set values in a JSON file; `text_config__hidden_act` stands for an entry of a section."""
    content = json.loads(path.read_text())
    for name, value in values.items():
        section = content
        *above, last = name.split("__")
        for step in above:
            section = section[step]
        section[last] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_agrees(state: State, tmp_path: Path, activation: str) -> None:
    write_huggingface(tmp_path, state)
    for tower in ("text", "vision"):
        change(tmp_path / "config.json", **{f"{tower}_config__hidden_act": activation})
    theirs, ours = CLIPModel.from_pretrained(tmp_path).eval(), load(tmp_path).module
    with torch.no_grad():
        image = theirs.visual_projection(theirs.vision_model(PIXELS).pooler_output)
        text = theirs.text_projection(theirs.text_model(TOKENS).pooler_output)
    torch.testing.assert_close(embeddings(ours), (image, text), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_the_preprocessing_of_the_folder(state: State, tmp_path: Path, file: str) -> None:
    write_huggingface(tmp_path, state)
    square = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(
        size=square, crop_size=square, resample=2, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    )
    processor.save_pretrained(tmp_path)
    if file == "processor_config.json":  # as transformers 5 writes it
        content = json.loads((tmp_path / "preprocessor_config.json").read_text())
        (tmp_path / file).write_text(json.dumps({"image_processor": content}))
        (tmp_path / "preprocessor_config.json").unlink()
    image = load(tmp_path).image
    assert (image.mean, image.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (image.interpolation, image.resize_mode) == ("bilinear", "squash")


@pytest.mark.parametrize(
    ("file", "values", "facts"),
    [
        ("config.json", {"text_config__hidden_act": "gelu"}, "hidden_act gelu and quick_gelu"),
        ("config.json", {"text_config__hidden_act": "relu", "vision_config__hidden_act": "relu"}, "hidden_act relu"),
        ("config.json", {"text_config__layer_norm_eps": 0.1}, r"layer_norm_eps .*0\.1"),
        ("config.json", {"text_config__eos_token_id": 5}, "eos_token_id 5"),
        ("config.json", {"text_config__vocab_size": 100}, "vocabulary of 100.* 49408"),
        ("config.json", {"vision_config__hidden_size": "wide"}, r"config\.json: "),
        ("config.json", {"vision_config__num_hidden_layers": 3}, r"missing: visual\.transformer\.resblocks\.2"),
        ("config.json", {"model_type": "siglip"}, "CLIPModel"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 64}}, r"preprocessor_config\.json: .*64"),
        ("preprocessor_config.json", {"do_normalize": False}, r"preprocessor_config\.json: .*do_normalize"),
        ("preprocessor_config.json", {"resample": 0}, r"preprocessor_config\.json: "),
    ],
)
def test_folders_that_are_refused(state: State, tmp_path: Path, file: str, values: dict[str, Any], facts: str) -> None:
    write_huggingface(tmp_path, state)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    load(tmp_path)
    change(tmp_path / file, **values)
    with pytest.raises(UserError, match=facts):
        load(tmp_path)


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Replace the members of a zip by what `change` returns for them; None leaves a member out."""
    copy = path.with_suffix(".copy")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    shutil.move(copy, path)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_code_of_an_archive_is_not_opened_and_an_attack_is_refused(state: State, tmp_path: Path) -> None:
    path, canary = tmp_path / "jit.pt", tmp_path / "canary"
    write_jit(path, state)
    rewrite(path, lambda name, data: b"not Python at all" if "/code/" in name else data)
    assert torch.equal(load(path).module.state_dict()["visual.proj"], state["visual.proj"])
    for protocol in (2, 4):
        evil = pickle.dumps({"a": Evil(canary)}, protocol=protocol)
        rewrite(path, lambda name, data, evil=evil: evil if name.endswith("data.pkl") else data)
        with pytest.raises(UserError, match=r"jit\.pt .*nothing in it was run"):
            load(path)
        assert not canary.exists()
    pickle.loads(evil)
    assert canary.exists(), "the file was harmless: the test shows nothing"


@pytest.mark.parametrize("name", [name for name in open_clip.list_openai_models() if name.endswith("-quickgelu")])
def test_published_models_are_recognised_by_their_shapes(name: str) -> None:
    with torch.device("meta"):
        state = open_clip.CLIP(**open_clip.get_model_config(name)).state_dict()
    assert same_architecture(architecture_of(state, name), open_clip.get_model_config(name))


def test_a_small_resnet_is_recognised_too(tmp_path: Path) -> None:
    vision = {"image_size": 64, "layers": [1, 1, 2, 1], "width": 8, "patch_size": None, "head_width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    torch.manual_seed(0)
    clip = open_clip.CLIP(embed_dim=32, quick_gelu=True, vision_cfg=vision, text_cfg=text)
    torch.save(clip.state_dict(), tmp_path / "rn.pt")
    pixels, loaded = torch.randn(2, 3, 64, 64), load(tmp_path / "rn.pt")
    with torch.no_grad():
        assert torch.equal(loaded.module.eval().encode_image(pixels), clip.eval().encode_image(pixels))


def test_a_given_backbone_that_contradicts_the_shapes_is_named(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    with pytest.raises(UserError, match=f"clip_weights: {path} with clip_backbone ViT-B/16 does not fit"):
        load(path, clip_backbone="ViT-B/16")
    assert "quick-GELU" in load(path).source, "the default, which nobody gave, contradicts nothing"


def test_other_files_are_told_what_to_give(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({f"text.{n}" if not n.startswith("visual.") else n: t for n, t in state.items()}, path)
    with pytest.raises(UserError, match=r"weights\.pt: .*text_projection.*clip_backbone") as refused:
        load(path)
    assert "KeyError" not in str(refused.value)
    torch.save(state | {"visual.conv1.weight": torch.zeros(1280, 3, 16, 16)}, path)
    with pytest.raises(UserError, match=r"larger than any .*clip_backbone"):
        load(path)
    write_published(path, {f"clip.{n}": t for n, t in state.items()}, {})
    with pytest.raises(UserError, match=f"--resume {path}"):
        load(path)
