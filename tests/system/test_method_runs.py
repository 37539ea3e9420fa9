"""Every method from training to search, in one process and in two. LoRA has more in a file of its own."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import killed
import open_clip
import optuna
import pytest
import torch
from comparing import only_run
from media import write_video
from safetensors import safe_open
from safetensors.torch import load_file
from spread import spread
from transformers import CLIPModel

from adaclip_finetune import VideoIndex, load_retriever
from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.trainer import fit

Project = dict[str, Any]

METHODS: dict[str, Any] = {
    "full": {"method": "full"},
    "bitfit": {"method": "bitfit"},
    "ibs": {"method": "ibs"},
    "lora": {"method": "lora", "config": {"rank": 2, "dropout": 0.2}},
    "ssf": {"method": "ssf"},
    "adapter": {"method": "adapter", "config": {"dim": 4}},
    "prompt": {"method": "prompt", "config": {"depth": 2}},
    "lisa": {"method": "lisa", "config": {"sampling_interval": 2, "active_ratio": 0.3}},
    "adabn": {"method": "adabn"},
    "lora and bitfit": [{"method": "lora", "config": {"rank": 2}}, {"method": "bitfit"}],
    "lora and prompt": [{"method": "lora", "config": {"rank": 2}}, {"method": "prompt"}],
}
STAYS = {"adapter": "adapter", "prompt": "prompt", "lora and prompt": "joined"}
"""Methods that cannot be merged, and what messages call them."""
MORE: dict[str, Project] = {
    "prompt": {"policy_backbone": "frozen_clip"},
    "adabn": {
        "policy_backbone": "mobilenet_v3_large",
        "policy_weights": "random",
        "freeze_cnn": True,
        "num_frm": 2,
        "top_k": 1,
        "num_epochs": 1,
    },
}
SHORT = {"ibs": 2}  # epochs of a short run, otherwise 1: one is IBS's first phase
every_method = pytest.mark.parametrize("name", METHODS)


class Run(NamedTuple):
    name: str
    folder: Path


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, project: Project, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a finished run of each method, which tests only read."""
    return Run(request.param, trained(request.param, project, tmp_path_factory.mktemp("run")))


def trained(name: str, project: Project, output: Path, **more: Any) -> Path:
    """Train, and return the folder of the run."""
    fit(load_config(None, {**given(name, project, output), **more}))
    return only_run(output)


def given(name: str, project: Project, output: Path) -> Project:
    return {**project, "peft": METHODS[name], "coef_lr": 1.0, "output_dir": str(output), **MORE.get(name, {})}


def vectors(path: Path) -> torch.Tensor:
    return load_retriever(path).encode_text(["a red thing", "it is blue"])


def test_it_evaluates_to_its_own_figures_from_its_weights_and_its_adapter(
    run: Run, project: Project, tmp_path: Path
) -> None:
    table, noted = tmp_path / "t.json", json.loads((run.folder / "metrics.json").read_text())
    learned = noted["parameters"]["clip"]
    for source in (run.folder, run.folder / "adapter.safetensors"):
        if source.exists():  # full has no adapter
            assert main(["evaluate", str(source), "--annot", str(project["test_annot"]), "--json", str(table)]) == 0
            row = json.loads(table.read_text())["rows"][-1]
            assert row["t2v"]["MeanR"] == noted["finetuned"]["t2v"]["MeanR"]
            assert row["cost"]["percent_of_clip"] == pytest.approx(100 * learned["trainable"] / learned["total"])
            torch.testing.assert_close(vectors(source), vectors(run.folder), rtol=0, atol=1e-5)


def test_interpolated_it_ends_at_its_own_figures_or_is_refused(
    run: Run, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, noted = tmp_path / "t.json", json.loads((run.folder / "metrics.json").read_text())
    words = ["--annot", str(project["test_annot"]), "--interpolate", "0.5,1", "--json", str(table)]
    code = main(["evaluate", str(run.folder), *words])
    if run.name in STAYS:
        assert code == 2 and f"peft.method {STAYS[run.name]} of" in capsys.readouterr().err
        return
    *_, half, end = json.loads(table.read_text())["rows"]
    assert code == 0 and end["t2v"]["MeanR"] == noted["finetuned"]["t2v"]["MeanR"]
    if run.name == "adabn":  # only the selector changes
        assert half["t2v"]["MeanR"] == end["t2v"]["MeanR"]


def test_a_checkpoint_that_cannot_be_merged_names_its_method_and_needs_no_pretrained_weights(
    run: Run, project: Project, tmp_path: Path
) -> None:
    if run.name not in STAYS:
        pytest.skip("it can be merged")
    with safe_open(run.folder / "best.safetensors", "pt") as file:
        assert file.metadata()["method"] == STAYS[run.name]
    shutil.copytree(run.folder, tmp_path / "moved", ignore=shutil.ignore_patterns("adapter*"))
    words = ["a red thing"]
    moved = load_retriever(tmp_path / "moved", clip_weights=None).encode_text(words)
    torch.testing.assert_close(moved, load_retriever(run.folder).encode_text(words))
    for name in ("best.safetensors", "adapter.safetensors"):
        settings = {**given(run.name, project, tmp_path / name), "resume": str(run.folder / name), "num_epochs": 1}
        with pytest.raises(UserError, match=rf"peft\.method {STAYS[run.name]} .* peft\.method full"):
            fit(load_config(None, {**settings, "peft": METHODS["full"], "no_output": True}))
        assert fit(load_config(None, settings)).folder is not None


@pytest.mark.parametrize("name", ["adabn", "adapter", "prompt"])
def test_zero_shot_is_that_of_the_pretrained_model(name: str, project: Project, tmp_path: Path) -> None:
    folders = [trained(one, {**project, **MORE.get(name, {})}, tmp_path / one, num_epochs=1) for one in (name, "full")]
    own, full = (json.loads((folder / "metrics.json").read_text())["zero_shot"] for folder in folders)
    assert own == full


@every_method
def test_it_learns_in_bf16_with_accumulation_and_checkpointing(name: str, project: Project, tmp_path: Path) -> None:
    more = {"precision": "bf16", "gradient_accumulation_steps": 2, "batch_size": 2, "gradient_checkpointing": True}
    folder = trained(name, project, tmp_path, **more, num_epochs=SHORT.get(name, 1))
    state, pretrained = (
        load_file(folder / ("best.safetensors" if name == "full" else "adapter.safetensors")),
        load_file(Path(project["clip_weights"]) / "open_clip_model.safetensors"),
    )
    inside = {key.removeprefix("clip."): tensor for key, tensor in state.items() if key.startswith("clip.")}
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    assert bool(inside) == (name != "adabn")
    at_start = {key for key, tensor in inside.items() if key in pretrained and torch.equal(tensor, pretrained[key])}
    assert not [key for key in at_start if "resblocks" in key], "the setting freeze_layer_num freezes embeddings alone"


@pytest.mark.parametrize("form", ["open_clip", "huggingface"])
def test_exported_it_loads_elsewhere_with_the_same_vectors(
    form: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = main(["export", str(run.folder), "--format", form, "-o", str(tmp_path / "out")])
    if run.name in STAYS:
        assert code == 2 and STAYS[run.name] in capsys.readouterr().err and not (tmp_path / "out").exists()
        return
    assert code == 0
    clip, pixels = load_retriever(run.folder).model.clip, torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        if form == "open_clip":
            module, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
            found = module.eval().encode_image(pixels)
        else:
            theirs = CLIPModel.from_pretrained(tmp_path / "out").eval()
            found = theirs.visual_projection(theirs.vision_model(pixels).pooler_output)
        torch.testing.assert_close(found, clip.encode_image(pixels), rtol=1e-5, atol=1e-5)


def test_its_videos_are_indexed_and_found(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        write_video(tmp_path / "videos" / f"v{number}.mp4", 20 + 10 * number)
    index = ["index", str(run.folder), str(tmp_path / "videos"), "-o", str(tmp_path / "i"), "--num_workers", "0"]
    assert main(index) == 0
    assert main(["search", str(tmp_path / "i"), "a red thing", "-k", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    source = run.folder if run.name == "full" else run.folder / "adapter.safetensors"
    expected = VideoIndex.load(tmp_path / "i").search(load_retriever(source).encode_text(["a red thing"]), 2)[0]
    assert [hit["id"] for hit in found["hits"]] == [hit.video.id for hit in expected]


@every_method
def test_a_study_tunes_it_and_its_final_run_can_be_evaluated(name: str, project: Project, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/o.db"
    space = {"coef_lr": {"choices": [0.1, 1.0]}}
    tuning = {"n_trials": 2, "storage": storage, "sampler": {"name": "GridSampler"}, "opt_params": space}
    settings = {**given(name, project, tmp_path / "out"), "num_epochs": SHORT.get(name, 1), "optuna_cfg": tuning}
    (tmp_path / "c.json").write_text(json.dumps(settings))
    assert main(["train", "--config", str(tmp_path / "c.json")]) == 0
    trials = optuna.load_study(study_name=None, storage=storage).trials
    assert {trial.params["coef_lr"] for trial in trials} == {0.1, 1.0}
    (best,) = (tmp_path / "out").rglob("best.safetensors")
    assert main(["evaluate", str(best), "--annot", str(project["test_annot"])]) == 0


def test_lisa_shows_its_probabilities(project: Project, tmp_path: Path) -> None:
    folder = trained("lisa", project, tmp_path, num_epochs=1)
    with (folder / "lisa_probabilities.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} == {"0", "2"} and (folder / "lisa_probabilities.png").stat().st_size
    assert sum(float(row["probability"]) for row in rows if row["step"] == "2") == pytest.approx(1)


def _train(name: str, project: Project, output: Path) -> None:
    more: Project = {"peft.config.dropout": 0} if name == "lora" else {}  # which each process draws for itself
    trained(name, project, output, learning_rate=1e-4, num_epochs=SHORT.get(name, 1), **more)


@every_method
def test_two_processes_learn_what_one_does(name: str, project: Project, tmp_path: Path) -> None:
    assert spread(_train, 2, tmp_path / "log", name, project, tmp_path / "two") == [0, 0]
    _train(name, project, tmp_path / "one")
    one, two = (load_file(only_run(tmp_path / where) / "best.safetensors") for where in ("one", "two"))
    if name == "adabn":  # deeper norms see batches that each process has normalised by itself
        stem = "selector.backbone.cnn.features.0.1.running_"
        one, two = ({key: state[key] for key in (f"{stem}mean", f"{stem}var")} for state in (one, two))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "adabn"])
def test_a_killed_run_resumes_bit_for_bit(name: str, project: Project, tmp_path: Path) -> None:
    one, other = killed.whole_and_resumed(given(name, project, tmp_path), tmp_path)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
