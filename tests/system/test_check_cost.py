"""`adaclip check --config`: what a run would take and whether it can be resumed, held against a run."""

import json
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checking import checked, finding, kinds
from killed import run

from adaclip_finetune.check import cost
from adaclip_finetune.config import load_config
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval
from adaclip_finetune.lock import this_process
from adaclip_finetune.training import checkpoint as snapshots
from adaclip_finetune.training.checkpoint import save_tensors
from adaclip_finetune.training.session import open_model
from adaclip_finetune.training.trainer import fit

Usage = namedtuple("Usage", "total used free")
Captured = pytest.CaptureFixture[str]
Project = dict[str, Any]


def config_file(folder: Path, project: Project, **changes: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(project | {"output_dir": str(folder / "output")} | changes))
    return str(path)


# ---- cost ----


def test_a_sound_project(project: Project, tmp_path: Path, capsys: Captured) -> None:
    code, found = checked(capsys, "--config", config_file(tmp_path, project))
    assert code == 0 and kinds(found, "fails") == set()
    assert kinds(found, "fine") >= {("disk", "run"), ("memory", "run"), ("time", "run"), ("videos", "train")}
    assert set(found["splits"]) == {"train", "val", "test"} and not (tmp_path / "output").exists()
    times = finding(found, "time", "run").items
    assert (times["tried"], times["batch_size"]) == (2, 4)
    assert times["batch"] == pytest.approx(times["computing_a_batch"] + times["reading_a_batch"])  # num_workers 0
    assert times["epoch"] == pytest.approx(3 * times["batch"])  # 12 videos
    assert times["run"] == pytest.approx(2 * (times["epoch"] + times["validation"])) and times["validation"] > 0


def test_an_evaluation(project: Project, tmp_path: Path, capsys: Captured) -> None:
    """8 videos with one text each: only the test split, without a training time."""
    path = config_file(tmp_path, project, do_inference=True, save_similarity=str(tmp_path / "m.npy"), no_output=True)
    code, found = checked(capsys, "--config", path)
    assert code == 0 and set(found["splits"]) == {"test"} and ("memory", "run") in kinds(found, "fine")
    assert ("time", "run") not in kinds(found, "fine")
    assert finding(found, "disk", "run").items["peak"] == 4 * 8 * 8


def test_the_disk_that_a_run_takes(
    project: Project, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimates are the most that files of a run ever take together, and what stays."""
    _, found = checked(capsys, "--config", config_file(tmp_path, project, num_epochs=3))
    told = finding(found, "disk", "run").items
    most, save = 0, snapshots.save_tensors

    def watched(path: Path, *rest: Any) -> None:
        nonlocal most
        save(path, *rest)
        inodes = {file.stat().st_ino: file.stat().st_size for file in tmp_path.rglob("*.safetensors")}
        most = max(most, sum(inodes.values()))

    monkeypatch.setattr(snapshots, "save_tensors", watched)
    monkeypatch.setattr(Retrieval, "is_better", lambda *_: True)  # so that there are an old best and a new one
    folder = fit(load_config(str(tmp_path / "config.json"))).folder
    assert folder is not None
    kept = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert kept == pytest.approx(told["left at the end"], rel=0.02)
    assert 0.95 * told["peak"] < most < 1.02 * told["peak"]


def test_too_little_disk(project: Project, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config_file(tmp_path, project, num_workers=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**40, 2**40, 1000))
    code, found = checked(capsys, "--config", path)
    shared = {("shared_memory", "run")} if Path("/dev/shm").is_dir() else set()
    assert code == 1 and kinds(found, "fails") == {("disk", "run")} | shared
    # The superuser may write anywhere, so the answer of the system is made up.
    monkeypatch.setattr(os, "access", lambda folder, mode: Path(folder) != tmp_path)
    more = ("--no_output", "--save_similarity", f"{tmp_path}/m.npy", "--num_workers", "0")
    _, found = checked(capsys, "--config", path, *more)
    assert kinds(found, "fails") == {("closed_folder", "run")}
    assert "save_similarity" in finding(found, "closed_folder", "run").message


@pytest.mark.parametrize(("do_inference", "setting"), [(True, "val_batch_size"), (False, "batch_size")])
def test_too_little_memory(
    do_inference: bool,
    setting: str,
    project: Project,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is tried if the batches that are read ahead do not fit: 8 or 12 videos of one byte a value."""
    path, real = config_file(tmp_path, project, do_inference=do_inference), psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=0))
    code, found = checked(capsys, "--config", path, "--num_workers", "2", "--batch_size", "32", "--val_batch_size", "8")
    assert code == 1 and kinds(found, "fails") == {("memory", "run")} and ("time", "run") not in kinds(found, "fine")
    told, video = finding(found, "memory", "run"), project["num_frm"] * (3 * 32 * 32 + 8 * 8)
    assert setting in told.advice and told.items["batches read ahead"] == (8 if do_inference else 12) * video


@pytest.mark.parametrize(("probed", "flag"), [("try_steps", "batch_size 2"), ("blank_videos", "--val_batch_size")])
def test_a_batch_that_does_not_fit(
    probed: str, flag: str, project: Project, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(cost, probed)

    def scarce(*given: Any) -> Any:
        if probed == "try_steps":
            return "CUDA out of memory" if given[-1] > 1 else real(*given)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(cost, probed, scarce)
    path = config_file(tmp_path, project)
    code, found = checked(capsys, "--config", path)
    refused = finding(found, "gpu_memory", "run")
    assert code == 1 and "out of memory" in refused.message and flag in refused.message
    if probed == "try_steps":
        code, found = checked(capsys, "--config", path, "--auto_batch_size")
        assert code == 0 and finding(found, "gpu_memory", "run").severity == "warning"


# ---- the model ----


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
    assert code == 1 and kinds(found, "fails") == {("model", "run"), ("search", "run")}
    assert "max_txt_len" in finding(found, "model", "run").message
    assert "learning_rat" in finding(found, "search", "run").message and ("videos", "val") in kinds(found, "fine")
    study["opt_params"] = {"learning_rate": {"range": [1e-4, 1e-2]}}
    code, found = checked(capsys, "--config", config_file(tmp_path, project, optuna_cfg=study))
    assert code == 0 and "3 trials" in finding(found, "search", "run").message


# ---- a run that is resumed ----


def test_resuming(project: Project, tmp_path: Path, capsys: Captured) -> None:
    """What the trainer would refuse fails, and checking changes nothing in the folder."""
    annotation = json.loads(Path(project["train_annot"]).read_text())
    train = tmp_path / "train.json"
    train.write_text(json.dumps(annotation))
    settings = project | {"output_dir": str(tmp_path / "output"), "train_annot": str(train)}
    assert run(settings, tmp_path / "log", "update", 5) == -signal.SIGKILL
    (folder,) = (tmp_path / "output" / "tiny").iterdir()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, found = checked(capsys, "--resume", str(folder))
    assert code == 0 and "after update 3" in finding(found, "resume", "run").message
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    annotation["video3"]["sentences"] = ["quite another thing"]
    train.write_text(json.dumps(annotation))
    code, found = checked(capsys, "--resume", str(folder))
    assert code == 1 and kinds(found, "fails") == {("other_data", "run")}
    assert "the training data" in finding(found, "other_data", "run").message
    (folder / "lock.json").write_text(json.dumps(this_process()))
    (folder / "metrics.json").write_text("{}")
    code, found = checked(capsys, "--resume", str(folder))
    assert code == 1 and kinds(found, "fails") == {("locked", "run"), ("finished", "run")}
    assert f"process {os.getpid()}" in finding(found, "locked", "run").message
    for name in ("lock.json", "metrics.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="the training data"):
        fit(continued_config(load_config(None, {"resume": str(folder)})), folder)
