"""LoRA: what only it has. `test_method_runs.py` has what all methods have."""

import json
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from comparing import only_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaclip_finetune import load_retriever
from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.trainer import fit

Project = dict[str, Any]

LORA = {"peft": {"method": "lora", "config": {"rank": 2}}, "coef_lr": 1.0}


def trained(settings: Project, output: Path, **more: Any) -> Path:
    """Train, and return the folder of the run."""
    fit(load_config(None, {**settings, **LORA, "output_dir": str(output), **more}))
    return only_run(output)


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
    [{"peft": {"method": "lora", "config": {"rank": 2, "dora": True, "dropout": 0.1}}}, {"policy_backbone": "clip"}],
    ids=lambda settings: next(iter(settings)),
)
def test_it_changes_the_targeted_weights_only(settings: Project, project: Project, tmp_path: Path) -> None:
    state = load_file(trained(project, tmp_path, num_epochs=1, **settings) / "best.safetensors")
    assert not any("parametrizations" in name for name in state)
    pretrained = load_file(Path(project["clip_weights"]) / "open_clip_model.safetensors")
    moved = [name for name, tensor in pretrained.items() if not torch.equal(tensor, state[f"clip.{name}"])]
    assert len(moved) == 2 * 2 * 4 and all("resblocks" in name and name.endswith("weight") for name in moved)


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


def test_an_adapter_holds_the_matrices_alone(run: Path) -> None:
    with safe_open(run / "adapter.safetensors", "pt") as file:
        inside = {name for name in file.keys() if name.startswith("clip.")}  # noqa: SIM118
    assert inside and all(".parametrizations." in name and re.search(r"\.(up|down)\.\d$", name) for name in inside)
    assert (run / "adapter.safetensors").stat().st_size < (run / "best.safetensors").stat().st_size / 5


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
