"""`adaclip export`: here and in the system it is meant for, what is written gives the same embeddings."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import build_tiny_clip
from indexing import write_run
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.export import export
from adaclip_finetune.training.session import open_model
from adaclip_finetune.weights.checkpoints import Kind, read_checkpoint
from adaclip_finetune.weights.clip_weights import load_clip

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WORDS = ["a dog runs", "two red cars, and a cat's ball"]
HEADS: dict[str, dict[str, Any]] = {
    "mlp": {"frame_agg": "mlp"},
    "transformer": {"frame_agg": "transformer", "rnn": "lstm", "mlp_type": "fc"},
    "seqTransf": {"frame_agg": None, "sim_header": "seqTransf", "word_agg": "mlp"},
    "one block": {"frame_agg": None, "sim_header": "transformer", "word_agg": "transformer", "use_rnn": False},
    "no policy": {"frame_agg": "qscore", "use_policy": False},
    "mobilenet": {"frame_agg": None, "policy_backbone": "mobilenet_v3_large", "policy_weights": "random"},
}


@pytest.fixture(scope="module")
def run(project: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that finetuned BitFit, as far as export reads it."""
    return finetuned(tmp_path_factory.mktemp("runs") / "run", {**project, "peft": {"method": "bitfit"}})


def finetuned(folder: Path, settings: dict[str, Any]) -> Path:
    return write_run(folder, settings, seed=1, learned=0.01)


def embeddings(module: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return module.eval().encode_image(PIXELS), module.encode_text(open_clip.tokenize(WORDS))


def expected(run: Path) -> tuple[Tensor, Tensor]:
    clip, state = build_tiny_clip(), load_file(run / "best.safetensors")
    clip.load_state_dict({name.removeprefix("clip."): t for name, t in state.items() if name.startswith("clip.")})
    return embeddings(clip)


@pytest.mark.parametrize("heads", HEADS)
def test_published_reads_back_as_it_was(
    project: dict[str, Any], tmp_path: Path, heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finetuned(tmp_path / "run", {**project, **HEADS[heads]})
    export(run if heads == "mlp" else run / "best.safetensors", "published", tmp_path / "such.pth")
    content = torch.load(tmp_path / "such.pth", weights_only=True)
    assert sorted(content) == ["arch", "config", "epoch", "optimizer", "state_dict"]
    assert content["config"]["frame_agg"] == HEADS[heads]["frame_agg"]
    known = ("clip.", "sampler.", "transformer", "frame_", "word_agg_")
    assert all(name.startswith(known) for name in content["state_dict"])
    checkpoint = read_checkpoint(tmp_path / "such.pth")
    assert (checkpoint.kind, checkpoint.epoch) == (Kind.PUBLISHED, "7")
    # Its CLIP and the CNN of its policy are in the file: nothing is downloaded.
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: pytest.fail("downloaded"))
    given = {k: v for k, v in {**project, **HEADS[heads]}.items() if k not in ("clip_weights", "policy_weights")}
    model = open_model(load_config(None, given), checkpoint).model
    stored = load_file(run / "best.safetensors")
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(embeddings(model.clip), expected(run), rtol=0, atol=1e-6)


def test_open_clip_reads_what_is_written(run: Path, tmp_path: Path) -> None:
    lines = export(run, "open_clip", tmp_path / "folder")
    assert "selector (" in lines[1] and "aggregator (" in lines[1] and "clip" not in lines[1]
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'folder'}")
    ours = load_clip(load_config(None, {"clip_weights": str(tmp_path / "folder")}))
    assert embeddings(theirs)[0].shape == (3, 64)
    torch.testing.assert_close(embeddings(theirs), expected(run), rtol=0, atol=1e-6)
    torch.testing.assert_close(embeddings(ours.module), expected(run), rtol=0, atol=0)
    modes = {path.stat().st_mode for path in (tmp_path / "folder").iterdir()}
    assert modes == {(run / "config.json").stat().st_mode}, "others may read it"
    # The preprocessing of the CLIP that the run began with comes along.
    assert ours.image.mean == (0.5, 0.5, 0.5) and ours.image.std == (0.25, 0.25, 0.25)
    assert open_clip.get_model_preprocess_cfg(theirs)["mean"] == [0.5, 0.5, 0.5]


def test_transformers_reads_what_is_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    export(run, "huggingface", tmp_path / "folder")
    theirs, found = CLIPModel.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "folder")
    with torch.no_grad():
        tokens = tokenizer(WORDS, padding=True, return_tensors="pt")
        text = theirs.eval().text_projection(theirs.text_model(**tokens).pooler_output)
        image = theirs.visual_projection(theirs.vision_model(PIXELS).pooler_output)
    torch.testing.assert_close((image, text), expected(run), rtol=1e-4, atol=1e-5)
    for words, ids in zip(WORDS, open_clip.tokenize(WORDS), strict=True):
        assert tokenizer(words)["input_ids"] == [number for number in ids.tolist() if number]
    ours = load_clip(load_config(None, {"clip_weights": str(tmp_path / "folder")}))
    torch.testing.assert_close(embeddings(ours.module), expected(run), rtol=0, atol=0)
    assert ours.image.mean == (0.5, 0.5, 0.5) and ours.image.resize_mode == "shortest"


def test_towers_with_gelu_stay_so_or_a_warning_says_otherwise(project: dict[str, Any], tmp_path: Path) -> None:
    gelu = tmp_path / "gelu"
    shutil.copytree(project["clip_weights"], gelu)
    content = json.loads((gelu / "open_clip_config.json").read_text())
    content["model_cfg"]["quick_gelu"] = False
    (gelu / "open_clip_config.json").write_text(json.dumps(content))
    run = finetuned(tmp_path / "run", {**project, "clip_weights": str(gelu)})
    for form in ("open_clip", "huggingface"):
        export(run, form, tmp_path / form)
        module = load_clip(load_config(None, {"clip_weights": str(tmp_path / form)})).module
        assert "QuickGELU" not in repr(module)
    lines = export(run, "published", tmp_path / "such.pth")
    assert "WARNING" in lines[-1] and "clip_backbone" in lines[-1]


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out" / "such.pth"
    words = ["export", str(run), "--format", "published", "-o", str(target)]
    assert main(words) == 2
    assert str(target.parent) in capsys.readouterr().err
    target.parent.mkdir()
    assert main(words) == 0
    assert f"{run / 'best.safetensors'} → {target}" in capsys.readouterr().out
    written = target.read_bytes()
    assert main(words) == 2
    assert f"-o {target}" in capsys.readouterr().err
    assert target.read_bytes() == written and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("form", ["published", "open_clip", "huggingface"])
def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, form: str) -> None:
    before, limits = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))  # tokenizers fit, weights do not
    try:
        with pytest.raises(UserError, match=f"-o {tmp_path / 'out'}: could not be written"):
            export(run, form, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before


def test_an_adapter_is_exported_as_the_weights_that_it_makes(run: Path, tmp_path: Path) -> None:
    assert (run / "adapter.safetensors").stat().st_size < (run / "best.safetensors").stat().st_size / 2
    for name in ("best", "adapter"):
        export(run / f"{name}.safetensors", "open_clip", tmp_path / name)
    best, adapter = (load_file(tmp_path / name / "open_clip_model.safetensors") for name in ("best", "adapter"))
    assert best.keys() == adapter.keys()
    assert all(torch.equal(tensor, best[name]) for name, tensor in adapter.items())


def test_what_cannot_be_exported(run: Path, project: dict[str, Any], tmp_path: Path) -> None:
    export(run, "published", tmp_path / "such.pth")
    frozen = finetuned(tmp_path / "frozen", {**project, "policy_backbone": "frozen_clip"})
    later = {"format": "adaclip-finetune/2", "content": "model", "config": "{}"}
    save_file(load_file(run / "best.safetensors"), tmp_path / "later.safetensors", metadata=later)
    for source, form, facts in (
        (tmp_path / "absent", "open_clip", "absent: "),
        (tmp_path, "open_clip", r"best\.safetensors"),
        (tmp_path / "later.safetensors", "published", r"format adaclip-finetune/2; .*adaclip-finetune/1"),
        (tmp_path / "such.pth", "open_clip", r"such\.pth is a published AdaCLIP checkpoint"),
        (frozen, "published", r"no place for these tensors: selector\.backbone\.visual.* more"),
    ):
        with pytest.raises(UserError, match=facts):
            export(source, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()
