"""Every method but LoRA, which has a file of its own, from training to evaluation, in one process and in two."""

import csv
import json
import signal
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from media import write_video
from safetensors.torch import load_file
from spread import spread

from adaclip_finetune import VideoIndex, load_retriever
from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.training.trainer import fit

Project = dict[str, Any]

METHODS: dict[str, Any] = {
    "full": {"method": "full"},
    "ssf": {"method": "ssf"},
    "adapter": {"method": "adapter", "config": {"dim": 4}},
    "prompt": {"method": "prompt", "config": {"depth": 2}},
    "lisa": {"method": "lisa", "config": {"sampling_interval": 2, "active_ratio": 0.3}},
    "adabn": {"method": "adabn"},
    "lora and bitfit": [{"method": "lora", "config": {"rank": 2}}, {"method": "bitfit"}],
    "lora and prompt": [{"method": "lora", "config": {"rank": 2}}, {"method": "prompt"}],
}
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
every_method = pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])


def trained(name: str, project: Project, output: Path, **more: Any) -> Path:
    """Train, and return the folder of the run."""
    fit(load_config(None, {**given(name, project, output), **more}))
    return next((output / "tiny").iterdir())


def given(name: str, project: Project, output: Path) -> Project:
    return {**project, "peft": METHODS[name], "coef_lr": 1.0, "output_dir": str(output), **MORE.get(name, {})}


def vectors(path: Path) -> torch.Tensor:
    return load_retriever(path).encode_text(["a red thing", "it is blue"])


@every_method
def test_a_run_evaluates_to_its_own_figures_from_its_weights_and_its_adapter(
    name: str, project: Project, tmp_path: Path
) -> None:
    run, table = trained(name, project, tmp_path / "out"), tmp_path / "t.json"
    noted = json.loads((run / "metrics.json").read_text())
    for source in (run, run / "adapter.safetensors"):
        assert main(["evaluate", str(source), "--annot", str(project["test_annot"]), "--json", str(table)]) == 0
        row = json.loads(table.read_text())["rows"][-1]
        assert row["t2v"]["MeanR"] == noted["finetuned"]["t2v"]["MeanR"]
    torch.testing.assert_close(vectors(run), vectors(run / "adapter.safetensors"), rtol=0, atol=1e-5)
    plain = trained("full", {**project, **MORE.get(name, {})}, tmp_path / "plain", num_epochs=1)
    assert noted["zero_shot"] == json.loads((plain / "metrics.json").read_text())["zero_shot"]


@every_method
def test_it_learns_in_bf16_with_accumulation_and_checkpointing(name: str, project: Project, tmp_path: Path) -> None:
    more = {"precision": "bf16", "gradient_accumulation_steps": 2, "batch_size": 2, "gradient_checkpointing": True}
    run = trained(name, project, tmp_path, **{**more, "num_epochs": 1})
    state, pretrained = (
        load_file(run / "adapter.safetensors"),
        load_file(Path(project["clip_weights"]) / "open_clip_model.safetensors"),
    )
    inside = {key.removeprefix("clip."): tensor for key, tensor in state.items() if key.startswith("clip.")}
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    assert bool(inside) == (name != "adabn")
    assert all(not torch.equal(tensor, pretrained[key]) for key, tensor in inside.items() if key in pretrained)


def test_a_run_that_cannot_be_merged_is_searched_and_not_exported(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("lora and prompt", project, tmp_path / "out", num_epochs=1)
    for number in range(3):
        write_video(tmp_path / "videos" / f"v{number}.mp4", 20)
    index = ["index", str(run), str(tmp_path / "videos"), "-o", str(tmp_path / "i"), "--num_workers", "0"]
    assert main(index) == 0
    assert main(["search", str(tmp_path / "i"), "a red thing", "-k", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = VideoIndex.load(tmp_path / "i").search(load_retriever(run).encode_text(["a red thing"]), 2)[0]
    assert [hit["id"] for hit in found["hits"]] == [hit.video.id for hit in expected]
    assert main(["export", str(run), "--format", "open_clip", "-o", str(tmp_path / "exported")]) == 2
    assert "joined" in capsys.readouterr().err


def test_lisa_shows_its_probabilities(project: Project, tmp_path: Path) -> None:
    run = trained("lisa", project, tmp_path, num_epochs=1)
    with (run / "lisa_probabilities.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} == {"0", "2"} and (run / "lisa_probabilities.png").stat().st_size
    assert sum(float(row["probability"]) for row in rows if row["step"] == "2") == pytest.approx(1)


def _train(name: str, project: Project, output: Path) -> None:
    trained(name, project, output, learning_rate=1e-4, num_epochs=1)


@every_method
def test_two_processes_learn_what_one_does(name: str, project: Project, tmp_path: Path) -> None:
    assert spread(_train, 2, tmp_path / "log", name, project, tmp_path / "two") == [0, 0]
    _train(name, project, tmp_path / "one")
    one, two = (load_file(next((tmp_path / where / "tiny").iterdir()) / "best.safetensors") for where in ("one", "two"))
    if name == "adabn":  # deeper norms see batches that each process has normalised by itself
        stem = "selector.backbone.cnn.features.0.1.running_"
        one, two = ({key: state[key] for key in (f"{stem}mean", f"{stem}var")} for state in (one, two))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("full", "adabn")])
def test_a_killed_run_resumes_bit_for_bit(name: str, project: Project, tmp_path: Path) -> None:
    states = []
    for which in ("whole", "killed"):
        settings = {**given(name, project, tmp_path / which), "save_every_steps": 1}
        if which == "killed":
            assert killed.run(settings, tmp_path / "log", "update", 4) == -signal.SIGKILL
            settings = {"resume": str(next((tmp_path / which / "tiny").iterdir()))}
        assert killed.run(settings, tmp_path / "log") == 0, (tmp_path / "log").read_text()
        folder = next((tmp_path / which / "tiny").iterdir())
        states.append(load_file(folder / "best.safetensors") | load_file(folder / "adapter.safetensors"))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
