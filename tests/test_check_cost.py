"""`adaclip check --config`: what a run would take, held against a run."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checking import checked, finding, kinds

from adaclip_finetune.check.cost import _together
from adaclip_finetune.check.model import build_trial_model
from adaclip_finetune.check.needs import check_disk
from adaclip_finetune.check.source import splits_of_config
from adaclip_finetune.check.steps import try_steps
from adaclip_finetune.config import load_config
from adaclip_finetune.training import snapshot as snapshots
from adaclip_finetune.training.trainer import fit

Usage = namedtuple("Usage", "total used free")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def config_file(folder: Path, project: dict[str, object], **changes: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(project | {"output_dir": str(folder / "output")} | changes))
    return str(path)


def test_a_sound_project(project: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checked(capsys, "--config", config_file(tmp_path, project))
    assert code == 0 and kinds(found, "fails") == set()
    assert kinds(found, "fine") >= {("disk", "run"), ("memory", "run"), ("time", "run"), ("videos", "train")}
    assert set(found["splits"]) == {"train", "val", "test"} and not (tmp_path / "output").exists()
    times = finding(found, "time", "run").items
    assert times["tried"] == times["batch_size"] == 4
    assert times["computing_a_batch"] > 0 and times["reading_a_batch"] > 0
    assert times["batch"] == pytest.approx(times["computing_a_batch"] + times["reading_a_batch"])  # num_workers 0
    assert times["epoch"] == pytest.approx(3 * times["batch"])  # 12 videos
    assert times["run"] == pytest.approx(2 * times["epoch"])


def test_the_disk_that_a_run_takes(project: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of a run is counted as it stands; the estimate is the most there ever was, and what stays."""
    config = load_config(None, project | {"output_dir": str(tmp_path), "num_epochs": 3})
    (told,) = check_disk(build_trial_model(config), splits_of_config(config))
    most, save = 0, snapshots.save_tensors

    def watched(path: Path, *rest: Any) -> None:
        nonlocal most
        save(path, *rest)
        inodes = {file.stat().st_ino: file.stat().st_size for file in tmp_path.rglob("*.safetensors")}
        most = max(most, sum(inodes.values()))

    monkeypatch.setattr(snapshots, "save_tensors", watched)
    folder = fit(config).folder
    assert folder is not None
    kept = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert kept == pytest.approx(told.items["left at the end"], rel=0.02)
    assert 0.5 * told.items["peak"] < most < 1.02 * told.items["peak"]


def test_a_disk_that_is_too_small(
    project: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(tmp_path, project, num_workers=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**40, 2**40, 1000))
    code, found = checked(capsys, "--config", path)
    assert code == 1
    assert kinds(found, "fails") == {("disk", "run")} | (
        {("shared_memory", "run")} if Path("/dev/shm").is_dir() else set()
    )
    assert str(tmp_path) in finding(found, "disk", "run").message
    _, found = checked(capsys, "--config", path, "--no_output", "--num_workers", "0")
    assert kinds(found, "fails") == set()


def test_memory_that_is_too_small(
    project: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = config_file(tmp_path, project), psutil.virtual_memory
    _, found = checked(capsys, "--config", path)
    needed = finding(found, "memory", "run").items
    assert needed["process"] > 100 * 2**20
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real()._replace(available=0))
    code, found = checked(capsys, "--config", path)
    assert code == 1 and ("memory", "run") in kinds(found, "fails")


def test_activations_are_counted(project: dict[str, object]) -> None:
    """A batch twice as large needs as much again, in bytes that the backward keeps."""
    from adaclip_finetune.check.steps import _two_steps
    from adaclip_finetune.training.optimizer import build_optimizer

    trial = build_trial_model(load_config(None, project))
    optimizer, _ = build_optimizer(trial.model, trial.config, 2)
    small, large = (_two_steps(trial, optimizer, size, 2)[2] for size in (4, 8))
    assert 1.8 * small < large < 2.2 * small


def test_a_batch_that_does_not_fit(
    project: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaclip_finetune.check import steps

    real = steps.blank_videos

    def scarce(config: Any, image: Any, count: int) -> Any:
        if count > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(config, image, count)

    monkeypatch.setattr(steps, "blank_videos", scarce)
    code, found = checked(capsys, "--config", config_file(tmp_path, project))
    refused = finding(found, "gpu_memory", "run")
    assert code == 1 and "batch_size 4" in refused.message and "--batch_size 2" in refused.message
    code, found = checked(capsys, "--config", config_file(tmp_path, project), "--auto_batch_size")
    assert code == 0 and finding(found, "gpu_memory", "run").severity == "warning"


def test_what_goes_on_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and computing, seconds a batch, on 8 processors."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert _together(3.0, 2.0, 0, GPU) == 5.0
    assert _together(3.0, 2.0, 2, GPU) == 3.0
    assert _together(3.0, 2.0, 2, CPU) == 3.0  # 6 + 8 of processor time, 8 at once
    assert _together(3.0, 4.0, 8, CPU) == 5.0  # 24 + 16


def test_a_slow_step_is_extrapolated(project: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    from adaclip_finetune.check import steps

    sizes = []

    def slow(trial: Any, optimizer: Any, size: int, k: int) -> tuple[float, float, int]:
        sizes.append(size)
        return float(size), 0.5, 1000 * size

    monkeypatch.setattr(steps, "_two_steps", slow)
    found = try_steps(build_trial_model(load_config(None, project)), 64)
    assert sizes == [2, 4] and (found.tried, found.seconds, found.batch_size) == (4, 64.5, 64)


def test_the_model_is_no_other_than_a_run_would_build(
    project: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run refuses when it builds the model fails, and the rest is told all the same."""
    code, found = checked(capsys, "--config", config_file(tmp_path, project, max_txt_len=500))
    assert code == 1 and kinds(found, "fails") == {("model", "run")}
    assert "max_txt_len" in finding(found, "model", "run").message and ("videos", "val") in kinds(found, "fine")


def test_towers_that_would_be_fetched_are_random(project: dict[str, object]) -> None:
    config = load_config(None, project | {"clip_weights": None, "clip_backbone": "RN50-quickgelu:openai"})
    model = build_trial_model(config).model
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_what_only_evaluates_is_not_timed(
    project: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(tmp_path, project, do_inference=True)
    code, found = checked(capsys, "--config", path)
    assert (
        code == 0 and set(found["splits"]) == {"test"} and "time" not in {entry["check"] for entry in found["findings"]}
    )
