"""A run folder is whole: it works after it was copied elsewhere, without its first place and its CLIP weights."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from comparing import Project, evaluated, figures
from conftest import write_clip_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from adaclip_finetune import load_retriever
from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.weights.clip_weights import load_clip
from adaclip_finetune.weights.plain import weights_digest

TEXTS = ["a red thing", "it is blue", "number 7"]
WORDS = ["[PAD]", "[UNK]", "[BOS]", "a", "it", "is", "thing", "number", "red", "green", "blue", "grey"]
WORDS += [*map(str, range(40)), "[EOS]"]


def write_clip_with_words(folder: Path, seed: int = 0) -> None:
    """Write an open_clip folder with a Hugging Face tokenizer of these WORDS; the end token is the largest id."""
    folder.mkdir()
    text = {"context_length": 24, "vocab_size": len(WORDS), "width": 64, "heads": 2, "layers": 2}
    text["hf_tokenizer_name"] = "of/this-test"
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64}
    model_cfg = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    torch.manual_seed(seed)
    towers = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(towers.state_dict(), folder / "open_clip_model.safetensors")
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    ends = [("[BOS]", WORDS.index("[BOS]")), ("[EOS]", WORDS.index("[EOS]"))]
    words.post_processor = TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="[BOS]", eos_token="[EOS]", pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


RUNS = {
    "CLIP's tokens, bitfit": (write_clip_folder, "bitfit"),
    "tokens of Hugging Face, lora": (write_clip_with_words, "lora"),
}


class Moved(NamedTuple):
    """A run that was moved."""

    run: Path  # the copy
    clip: Path  # where the pretrained weights are now
    was: Path  # where they were in training
    index: Path  # made with the run before it moved
    vectors: torch.Tensor  # of TEXTS, made with the run before it moved
    noted: dict[str, Any]
    project: Project


@pytest.fixture(scope="module", params=RUNS)
def moved(request: pytest.FixtureRequest, project: Project, tmp_path_factory: pytest.TempPathFactory) -> Moved:
    folder = tmp_path_factory.mktemp("moved")
    origin, clip = folder / "origin", folder / "origin" / "clip"
    origin.mkdir()
    write_clip, method = RUNS[request.param]
    write_clip(clip)
    settings = {**project, "clip_weights": str(clip), "output_dir": str(origin), "num_epochs": 1, "learning_rate": 1e-2}
    (origin / "config.json").write_text(json.dumps(settings | {"peft": {"method": method}}))
    assert main(["train", "--config", str(origin / "config.json")]) == 0
    (run,) = (origin / str(project["dataset"])).iterdir()
    index = folder / "old.index"
    assert main(["index", str(run), str(project["val_annot"]), "-o", str(index)]) == 0
    vectors, noted = load_retriever(run).encode_text(TEXTS), json.loads((run / "metrics.json").read_text())
    shutil.copytree(run, folder / "copy")
    origin.rename(folder / "gone")
    return Moved(folder / "copy", folder / "gone" / "clip", clip, index, vectors, noted, project)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def with_other_values(clip: Path, copy: Path) -> Path:
    """Copy CLIP weights of which only a value tells that they are others."""
    shutil.copytree(clip, copy)
    state = load_file(clip / "open_clip_model.safetensors")
    state["logit_scale"] += 1e-3
    save_file(state, copy / "open_clip_model.safetensors")
    return copy


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return {name: json.loads(value) if value[0] == "{" else value for name, value in file.metadata().items()}


def with_zero_shot(moved: Moved, checkpoint: Path, folder: Path) -> None:
    """Evaluate with the pretrained weights at hand; both rows must be those that training noted."""
    words = ["--annot", moved.project["test_annot"], "--clip_weights", moved.clip]
    zero_shot, row = evaluated(checkpoint, *words, folder=folder)["rows"]
    assert (figures(zero_shot), figures(row)) == (moved.noted["zero_shot"], moved.noted["finetuned"])


def test_it_is_evaluated(moved: Moved, tmp_path: Path) -> None:
    found = evaluated(moved.run, "--annot", moved.project["test_annot"], folder=tmp_path)
    (row,) = found["rows"]  # there is no zero-shot row, since the pretrained weights are not there
    assert figures(row) == moved.noted["finetuned"]
    with_zero_shot(moved, moved.run, tmp_path)


def test_another_clip_in_the_place_of_its_own_changes_nothing_and_is_named(
    moved: Moved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_other_values(moved.clip, tmp_path / "other")
    config = json.loads((other / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.1, 0.1, 0.1]
    config["model_cfg"]["quick_gelu"] = not config["model_cfg"].get("quick_gelu", False)
    (other / "open_clip_config.json").write_text(json.dumps(config))
    model = load_retriever(moved.run, clip_weights=str(other))
    torch.testing.assert_close(model.encode_text(TEXTS), moved.vectors, rtol=0, atol=1e-6)
    assert model.loaded.image == load_retriever(moved.run).loaded.image
    words = ["--do_inference", "--resume", str(moved.run / "best.safetensors"), "--output_dir", str(tmp_path / "out")]
    words += ["--clip_weights", str(other)]
    assert main(["train", "--config", str(moved.run / "config.json"), *words]) == 0
    told = capsys.readouterr().out
    (found,) = (tmp_path / "out").glob("*/*/metrics.json")
    assert json.loads(found.read_text()) == {"best.safetensors": moved.noted["finetuned"]}
    digest = metadata(moved.run / "best.safetensors")["clip"]["digest"][:12]
    assert str(other) in told and digest in told  # beside the reason why there is no zero-shot


def test_it_makes_an_index_and_searches_the_old_one(moved: Moved, tmp_path: Path) -> None:
    new, annotation = str(tmp_path / "new.index"), str(moved.project["val_annot"])
    assert main(["index", str(moved.run), annotation, "-o", new]) == 0
    assert main(["search", new, "a red thing"]) == 0
    assert main(["search", str(moved.index), "a red thing", "--model", str(moved.run)]) == 0
    old, again = (load_file(folder / "vectors.safetensors")["vectors"] for folder in (moved.index, Path(new)))
    torch.testing.assert_close(again, old, rtol=0, atol=1e-6)
    assert VideoIndex.load(new).info.fingerprint == VideoIndex.load(moved.index).info.fingerprint


def test_it_is_exported(moved: Moved, tmp_path: Path) -> None:
    best = load_file(moved.run / "best.safetensors")
    for name, where in (("best", []), ("adapter", ["--clip_weights", str(moved.clip)])):
        words = ["export", str(moved.run / f"{name}.safetensors"), "--format", "open_clip", "-o", str(tmp_path / name)]
        assert main([*words, *where]) == 0
        exported = load_clip(load_config(None, {"clip_weights": str(tmp_path / name)}))
        assert all(torch.equal(tensor, best[f"clip.{n}"]) for n, tensor in exported.module.state_dict().items())
    before = load_clip(load_config(None, {"clip_weights": str(moved.clip)}))
    assert exported.image == before.image
    assert torch.equal(exported.tokenize(TEXTS, 20), before.tokenize(TEXTS, 20))


def test_it_is_trained_on_and_that_run_is_whole_too(moved: Moved, tmp_path: Path) -> None:
    words = ["--resume", str(moved.run / "best.safetensors"), "--output_dir", str(tmp_path / "out")]
    assert main(["train", "--config", str(moved.run / "config.json"), *words]) == 0
    (second,) = (tmp_path / "out").glob("*/*")
    first = metadata(moved.run / "best.safetensors")
    assert metadata(second / "best.safetensors")["clip"] == first["clip"]
    load_retriever(second).encode_text(TEXTS)


def test_the_best_weights_need_only_a_tokenizer_that_is_not_clip_s(moved: Moved, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(moved.run / "best.safetensors", alone)
    with_words = "hf_tokenizer_name" in metadata(moved.run / "best.safetensors")["clip"]["model_cfg"]["text_cfg"]
    assert (moved.run / "tokenizer").exists() == with_words
    if with_words:
        with pytest.raises(UserError, match=r"tokenizer.* copy the whole run folder"):
            load_retriever(alone / "best.safetensors")
        shutil.copytree(moved.run / "tokenizer", alone / "tokenizer")
    for source in (alone / "best.safetensors", alone, moved.run):
        torch.testing.assert_close(load_retriever(source).encode_text(TEXTS), moved.vectors, rtol=0, atol=1e-6)


def test_an_adapter_goes_over_the_weights_that_it_was_made_for(moved: Moved, tmp_path: Path) -> None:
    adapter = moved.run / "adapter.safetensors"
    told = metadata(adapter)["clip"]
    pretrained = load_clip(load_config(None, {"clip_weights": str(moved.clip)})).module
    assert (told["source"], told["digest"]) == (
        str(moved.was / "open_clip_model.safetensors"),
        weights_digest(pretrained),
    )
    assert told["pretrained"] is None  # open_clip cannot fetch these weights
    assert adapter.stat().st_size < (moved.run / "best.safetensors").stat().st_size / 2
    model = load_retriever(adapter, clip_weights=str(moved.clip))
    torch.testing.assert_close(model.encode_text(TEXTS), moved.vectors, rtol=0, atol=1e-6)
    with_zero_shot(moved, adapter, tmp_path)


@pytest.mark.parametrize("given", [True, False], ids=["other weights", "no weights"])
def test_an_adapter_without_its_weights_is_refused_by_every_command(
    moved: Moved, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: bool
) -> None:
    adapter, annotation = moved.run / "adapter.safetensors", moved.project["test_annot"]
    other = with_other_values(moved.clip, tmp_path / "other")
    train = ("train", "--config", moved.run / "config.json", "--do_inference", "--no_output", "--resume", adapter)
    for words in (
        ("evaluate", adapter, "--annot", annotation),
        ("index", adapter, annotation, "-o", tmp_path / "i"),
        ("export", adapter, "--format", "open_clip", "-o", tmp_path / "e"),
        train,
        (*train, "--dry_run"),
    ):
        capsys.readouterr()
        assert main([*map(str, words), *(["--clip_weights", str(other)] if given else [])]) == 2
        told = capsys.readouterr().err
        assert str(moved.was) in told and ("--clip_weights" in told or words[0] == "train")
        if given:
            assert str(adapter) in told and str(other) in told
            assert metadata(adapter)["clip"]["digest"][:12] in told
    assert not (tmp_path / "i").exists() and not (tmp_path / "e").exists()
