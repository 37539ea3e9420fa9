"""`adaclip check --config`: the model of a run, and what the run would take."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
from checking import checked, finding, kinds

from adaclip_finetune.check import run
from adaclip_finetune.config import load_config
from adaclip_finetune.training.checkpoint import save_tensors
from adaclip_finetune.training.session import open_model

Usage = namedtuple("Usage", "total used free")
Captured = pytest.CaptureFixture[str]
Project = dict[str, Any]


def config_file(folder: Path, project: Project, **changes: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(project | {"output_dir": str(folder / "output")} | changes))
    return str(path)


def test_a_sound_project(project: Project, tmp_path: Path, capsys: Captured) -> None:
    code, found = checked(capsys, "--config", config_file(tmp_path, project))
    assert code == 0 and kinds(found, "fails") == set()
    assert kinds(found, "fine") >= {("disk", "run"), ("memory", "run"), ("time", "run"), ("videos", "train")}
    assert set(found["splits"]) == {"train", "val", "test"} and not (tmp_path / "output").exists()
    times = finding(found, "time", "run").items
    assert times["batch_size"] == 4 and times["reading_a_batch"] > 0
    assert times["run"] == pytest.approx(2 * 3 * times["computing_a_batch"])  # 2 epochs of 12 videos


def test_an_evaluation_and_a_resumed_run(project: Project, tmp_path: Path, capsys: Captured) -> None:
    """An evaluation reads the test split alone; a run folder gives the settings of its run."""
    path = config_file(tmp_path, project)
    for words in (["--config", path, "--do_inference"], ["--resume", str(tmp_path)]):
        code, found = checked(capsys, *words)
        trains = "--resume" in words
        assert code == 0 and set(found["splits"]) == ({"train", "val", "test"} if trains else {"test"})
        assert (("time", "run") in kinds(found, "fine")) == trains


@pytest.mark.parametrize(
    ("scarce", "failing"),
    [("memory", {"memory"}), ("disk", {"disk", *(["shared_memory"] if Path("/dev/shm").is_dir() else [])})],
)
def test_too_little_room(
    scarce: str, failing: set[str], project: Project, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is tried if the batches that are read ahead do not fit."""
    real = psutil.virtual_memory()
    if scarce == "memory":
        monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=0))
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**40, 2**40, 1000))
    code, found = checked(capsys, "--config", config_file(tmp_path, project), "--num_workers", "2")
    assert code == 1 and kinds(found, "fails") == {(check, "run") for check in failing}
    assert ("time", "run") not in kinds(found, "fine")
    if scarce == "memory":
        told, video = finding(found, "memory", "run"), project["num_frm"] * (3 * 32 * 32 + 8 * 8)
        assert "batch_size" in told.advice and told.items["needed"] == (2 * 2 + 2) * 4 * video


def test_a_batch_that_does_not_fit(
    project: Project, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "try_steps", lambda *_: "CUDA out of memory")
    path = config_file(tmp_path, project)
    code, found = checked(capsys, "--config", path)
    refused = finding(found, "memory", "run")
    assert code == 1 and "out of memory" in refused.message and "batch_size 2" in refused.message
    code, found = checked(capsys, "--config", path, "--auto_batch_size")
    assert code == 0 and finding(found, "memory", "run").severity == "warning"


def test_a_checkpoint_that_does_not_fit(project: Project, tmp_path: Path, capsys: Captured) -> None:
    config = load_config(None, project)
    path = tmp_path / "best.safetensors"
    save_tensors(path, open_model(config).model.state_dict(), {"content": "model", "config": config.model_dump_json()})
    words = ("--config", config_file(tmp_path, project, resume=str(path), do_inference=True))
    assert checked(capsys, *words)[0] == 0
    code, found = checked(capsys, *words, "--hidden_dim", "128")
    assert code == 1 and kinds(found, "fails") == {("model", "run")}
    assert "does not fit the model" in finding(found, "model", "run").message
    assert any(check == "long_captions" for check, _ in kinds(found, "fine"))


def test_what_a_run_refuses_fails(project: Project, tmp_path: Path, capsys: Captured) -> None:
    """The settings of the model and those of the hyperparameter study."""
    study = {"n_trials": 3, "opt_params": {"learning_rat": {"range": [1e-4, 1e-2]}}}
    code, found = checked(capsys, "--config", config_file(tmp_path, project, max_txt_len=500, optuna_cfg=study))
    assert code == 1 and kinds(found, "fails") == {("model", "run"), ("tuning", "run")}
    assert "max_txt_len" in finding(found, "model", "run").message
    assert "learning_rat" in finding(found, "tuning", "run").message and ("videos", "val") in kinds(found, "fine")
    study["opt_params"] = {"learning_rate": {"range": [1e-4, 1e-2]}}
    code, found = checked(capsys, "--config", config_file(tmp_path, project, optuna_cfg=study))
    assert code == 0 and "3 trials" in finding(found, "tuning", "run").message
