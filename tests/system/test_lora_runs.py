"""LoRA in every command, from training to tuning its rank."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import killed
import open_clip
import optuna
import pytest
import torch
from media import write_video
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spread import spread
from transformers import CLIPModel

from adaclip_finetune import VideoIndex, load_retriever
from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.trainer import fit

Project = dict[str, Any]

LORA = {"peft": {"method": "lora", "config": {"rank": 2}}, "coef_lr": 1.0}


def trained(settings: Project, output: Path, **more: Any) -> Path:
    """Train, and return the folder of the run."""
    fit(load_config(None, {**settings, **LORA, "output_dir": str(output), **more}))
    return next((output / "tiny").iterdir())


@pytest.fixture(scope="module")
def run(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run, which tests only read."""
    return trained(project, tmp_path_factory.mktemp("lora"))


def test_a_dry_run_counts_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(Path(__file__).resolve().parents[2] / "cfgs/lora.json")
    assert main(["train", "--config", recipe, "--dry_run", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Rank 8; 12 blocks of width 768 and 12 of width 512; q, k, v, out of W x W, fc and proj of W x 4W.
    expected = sum(12 * 8 * (4 * 2 * width + 2 * 5 * width) for width in (768, 512))
    assert found["parameters"]["clip"] == {"trainable": expected, "total": 151_277_313 + expected}
    assert found["gflops"]["clip_frame"] == pytest.approx(4.36, abs=0.01)  # that of the merged model


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"gradient_accumulation_steps": 2, "batch_size": 2},
        {"peft": {"method": "lora", "config": {"rank": 2, "dora": True, "dropout": 0.1}}},
        {"policy_backbone": "clip"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_it_changes_the_targeted_weights_only(settings: Project, project: Project, tmp_path: Path) -> None:
    state = load_file(trained(project, tmp_path, num_epochs=1, **settings) / "best.safetensors")
    assert not any("parametrizations" in name for name in state)
    pretrained = load_file(Path(project["clip_weights"]) / "open_clip_model.safetensors")
    moved = [name for name, tensor in pretrained.items() if not torch.equal(tensor, state[f"clip.{name}"])]
    assert len(moved) == 2 * 2 * 4 and all("resblocks" in name and name.endswith("weight") for name in moved)


def test_gradient_checkpointing_learns_the_same(run: Path, project: Project, tmp_path: Path) -> None:
    folder = trained(project, tmp_path, gradient_checkpointing=True)
    torch.testing.assert_close(load_file(folder / "best.safetensors"), load_file(run / "best.safetensors"))


def _train(settings: Project, output: Path) -> None:
    trained(settings, output, learning_rate=1e-4, num_epochs=1)


def test_two_processes_learn_what_one_does(project: Project, tmp_path: Path) -> None:
    assert spread(_train, 2, tmp_path / "log", project, tmp_path / "two") == [0, 0]
    _train(project, tmp_path / "one")
    one, two = (load_file(next((tmp_path / name / "tiny").iterdir()) / "best.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_the_command_that_a_run_prints_evaluates_it(
    run: Path, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = re.search(
        r"python train\.py (--config .*best\.safetensors) --test_annot", (run / "train.log").read_text()
    )
    assert printed is not None
    words = [*printed[1].split(), "--test_annot", str(project["test_annot"]), "--no_output"]
    assert main(["train", *words]) == 0
    figures = json.loads((run / "metrics.json").read_text())["finetuned"]["t2v"]
    assert f"best.safetensors  {figures['R@1']:7.1f}" in capsys.readouterr().out


def test_evaluate_tells_the_same_figures_and_what_learned(run: Path, project: Project, tmp_path: Path) -> None:
    table, noted = tmp_path / "t.json", json.loads((run / "metrics.json").read_text())
    for given in (run, run / "adapter.safetensors"):
        assert main(["evaluate", str(given), "--annot", str(project["test_annot"]), "--json", str(table)]) == 0
        row = json.loads(table.read_text())["rows"][-1]
        assert row["t2v"]["MeanR"] == noted["finetuned"]["t2v"]["MeanR"]
        learned = noted["parameters"]["clip"]
        assert row["cost"]["percent_of_clip"] == pytest.approx(100 * learned["trainable"] / learned["total"])


def test_its_videos_are_indexed_and_found(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        write_video(tmp_path / "videos" / f"v{number}.mp4", 20 + 10 * number)
    assert main(["index", str(run), str(tmp_path / "videos"), "-o", str(tmp_path / "i"), "--num_workers", "0"]) == 0
    assert main(["search", str(tmp_path / "i"), "a red thing", "-k", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    index, model = VideoIndex.load(tmp_path / "i"), load_retriever(run / "adapter.safetensors")
    hits = index.search(model.encode_text(["a red thing"]), 2)[0]
    assert [hit["id"] for hit in found["hits"]] == [hit.video.id for hit in hits]


def test_adapter_and_merged_weights_are_one_model(run: Path) -> None:
    one, other = load_retriever(run), load_retriever(run / "adapter.safetensors")
    words = ["a red thing", "it is blue"]
    torch.testing.assert_close(one.encode_text(words), other.encode_text(words), rtol=0, atol=1e-5)
    with safe_open(run / "adapter.safetensors", "pt") as file:
        inside = {name for name in file.keys() if name.startswith("clip.")}  # noqa: SIM118
    assert inside and all(".parametrizations." in name and re.search(r"\.(up|down)\.\d$", name) for name in inside)
    assert (run / "adapter.safetensors").stat().st_size < (run / "best.safetensors").stat().st_size / 5


@pytest.mark.parametrize("form", ["open_clip", "huggingface"])
def test_exported_it_loads_elsewhere_with_the_same_vectors(
    form: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["export", str(run), "--format", form, "-o", str(tmp_path / "out")]) == 0
    clip, pixels = load_retriever(run).model.clip, torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        if form == "open_clip":
            module, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
            found = module.eval().encode_image(pixels)
        else:
            theirs = CLIPModel.from_pretrained(tmp_path / "out").eval()
            found = theirs.visual_projection(theirs.vision_model(pixels).pooler_output)
        torch.testing.assert_close(found, clip.encode_image(pixels), rtol=1e-5, atol=1e-5)


def test_a_killed_run_resumes_bit_for_bit(project: Project, tmp_path: Path) -> None:
    given = {**project, **LORA, "peft": {"method": "lora", "config": {"rank": 2, "dropout": 0.2}}}
    states = []
    for name in ("whole", "killed"):
        settings = {**given, "output_dir": str(tmp_path / name), "save_every_steps": 1}
        if name == "killed":
            assert killed.run(settings, tmp_path / "log", "update", 4) == -signal.SIGKILL
            settings = {"resume": str(next((tmp_path / name / "tiny").iterdir()))}
        assert killed.run(settings, tmp_path / "log") == 0, (tmp_path / "log").read_text()
        folder = next((tmp_path / name / "tiny").iterdir())
        states.append(load_file(folder / "best.safetensors") | load_file(folder / "adapter.safetensors"))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_only_an_adapter_may_lack_the_frozen_copy_of_the_tower(project: Project, tmp_path: Path) -> None:
    folder = trained(project, tmp_path / "out", policy_backbone="frozen_clip", num_epochs=1)
    load_retriever(folder / "adapter.safetensors")
    state = load_file(folder / "best.safetensors")
    with safe_open(folder / "best.safetensors", "pt") as file:
        metadata = file.metadata()
    whole = {name: tensor for name, tensor in state.items() if not name.startswith("selector.backbone.")}
    assert len(whole) < len(state)
    save_file(whole, tmp_path / "best.safetensors", metadata)
    with pytest.raises(UserError, match=r"missing: selector\.backbone\."):
        load_retriever(tmp_path / "best.safetensors")


@pytest.mark.parametrize(("method", "start"), [("lora", "best.safetensors"), ("bitfit", "adapter.safetensors")])
def test_a_new_run_starts_from_merged_weights_or_an_adapter(
    method: str, start: str, run: Path, project: Project, tmp_path: Path
) -> None:
    more = {"peft": {"method": method}, "num_epochs": 1, "learning_rate": 1e-9, "resume": str(run / start)}
    folder = trained(project, tmp_path, **more)
    expected = load_file(run / "best.safetensors")
    torch.testing.assert_close(load_file(folder / "best.safetensors"), expected, rtol=1e-3, atol=1e-4)


def test_its_rank_can_be_tuned(project: Project, tmp_path: Path) -> None:
    tuning = {
        "n_trials": 2,
        "storage": f"sqlite:///{tmp_path}/o.db",
        "sampler": {"name": "GridSampler"},
        "opt_params": {"peft.config.rank": {"choices": [1, 2]}},
    }
    given = {**project, **LORA, "num_epochs": 1, "output_dir": str(tmp_path / "out"), "optuna_cfg": tuning}
    (tmp_path / "c.json").write_text(json.dumps(given))
    assert main(["train", "--config", str(tmp_path / "c.json")]) == 0
    trials = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/o.db").trials
    learned = {trial.params["peft.config.rank"]: trial.user_attrs["trainable_parameters"] for trial in trials}
    # One rank is (64 + 64) for each of q, k, v, out and (64 + 256) for each of fc, proj: in 2 blocks of 2 towers.
    assert learned[2] - learned[1] == 4 * (4 * 128 + 2 * 320)
