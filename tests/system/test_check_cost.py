"""`adaclip check --config`: what a run would take, held against a run."""

import itertools
import json
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import psutil
import pytest
import torch
from checking import checked, finding, kinds
from killed import run

from adaclip_finetune.check.cost import _together
from adaclip_finetune.check.disk import check_disk
from adaclip_finetune.check.finding import in_bytes
from adaclip_finetune.check.memory import Reading, check_memory, read_ahead
from adaclip_finetune.check.model import build_trial_model
from adaclip_finetune.check.source import splits_of_config
from adaclip_finetune.check.steps import try_steps
from adaclip_finetune.config import load_config
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval
from adaclip_finetune.lock import this_process
from adaclip_finetune.training import snapshot as snapshots
from adaclip_finetune.training.checkpoint import save_tensors
from adaclip_finetune.training.trainer import fit
from adaclip_finetune.tuning.run import describe

Usage = namedtuple("Usage", "total used free")
Memory = namedtuple("Memory", "rss")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def config_file(folder: Path, project: dict[str, object], **changes: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(project | {"output_dir": str(folder / "output")} | changes))
    return str(path)


def test_bytes_in_words() -> None:
    assert [in_bytes(count) for count in (0, 512, 3 << 19, 5 << 29)] == ["0.0 KiB", "0.5 KiB", "1.5 MiB", "2.5 GiB"]


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
    (told,) = check_disk(build_trial_model(config), splits_of_config(config), None)
    most, save = 0, snapshots.save_tensors

    def watched(path: Path, *rest: Any) -> None:
        nonlocal most
        save(path, *rest)
        inodes = {file.stat().st_ino: file.stat().st_size for file in tmp_path.rglob("*.safetensors")}
        most = max(most, sum(inodes.values()))

    monkeypatch.setattr(snapshots, "save_tensors", watched)
    monkeypatch.setattr(Retrieval, "is_better", lambda *_: True)  # so that there are an old best and a new one
    folder = fit(config).folder
    assert folder is not None
    kept = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert kept == pytest.approx(told.items["left at the end"], rel=0.02)
    assert 0.95 * told.items["peak"] < most < 1.02 * told.items["peak"]


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
    """Between what suffices and what does not lie two MiB."""
    trial, real = build_trial_model(load_config(None, project)), psutil.virtual_memory
    held, readings = int(psutil.Process().memory_info().rss), [Reading(4, 12)]
    ahead = read_ahead(trial.config, trial.model.views(), readings)
    for more, severity in ((1 << 20, "fails"), (-1 << 20, "fine")):
        peak = held + 2**30 - ahead + more
        monkeypatch.setattr(psutil, "virtual_memory", lambda: real()._replace(available=2**30))
        monkeypatch.setattr(psutil.Process, "memory_info", lambda self: Memory(held))
        (told,) = check_memory(trial, peak, readings)
        assert told.severity == severity and told.items["process"] == peak
    _, found = checked(capsys, "--config", config_file(tmp_path, project))
    assert ("memory", "run") in kinds(found, "fine")


def test_what_is_read_ahead_is_no_more_than_there_is(project: dict[str, object]) -> None:
    config = load_config(None, project | {"num_workers": 2, "num_frm": 16, "top_k": 4})
    views = build_trial_model(config).model.views()
    video = 16 * (3 * 32 * 32 + 8 * 8)  # pixels of 32x32, and what the policy sees: a byte each
    assert read_ahead(config, views, [Reading(32, 3), Reading(2, 1)]) == 3 * video
    assert read_ahead(config, views, [Reading(2, 1000), Reading(1, 8)]) == 2 * (2 * 3 + 2) * video


def test_the_figures_of_an_evaluation(
    project: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Disk, memory and the matrix are told for do_inference, too: 8 videos with one text each."""
    path = config_file(tmp_path, project, do_inference=True, save_similarity=str(tmp_path / "m.npy"))
    code, found = checked(capsys, "--config", path)
    assert code == 0 and kinds(found, "fine") >= {("disk", "run"), ("memory", "run")}
    disk = finding(found, "disk", "run").items
    assert (disk["similarity"], disk["embeddings"]) == (4 * 8 * 8, 4 * 64 * (2 * 8 + 2 * 8))
    _, found = checked(capsys, "--config", path, "--no_output")
    disk = finding(found, "disk", "run").items
    assert disk["peak"] == disk["similarity"] == 4 * 8 * 8


def test_an_evaluation_that_does_not_fit(
    project: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaclip_finetune.check import evaluation

    path, real = config_file(tmp_path, project, do_inference=True), psutil.virtual_memory
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real()._replace(available=0))
    code, found = checked(capsys, "--config", path)
    assert code == 1 and kinds(found, "fails") == {("memory", "run")}
    assert "val_batch_size" in finding(found, "memory", "run").advice

    def scarce(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(evaluation, "blank_videos", scarce)
    code, found = checked(capsys, "--config", path)
    assert code == 1 and "--val_batch_size" in finding(found, "gpu_memory", "run").message


def test_what_an_evaluation_takes_grows_with_its_batch(project: dict[str, object]) -> None:
    from adaclip_finetune.check.evaluation import _forward

    trial = build_trial_model(load_config(None, project))
    one, three = _forward(trial, 1), _forward(trial, 3)
    assert one >= 2 * 4 * 3 * 32 * 32 and three == 3 * one  # the pixels of top_k frames, at least


def test_a_folder_that_is_closed(
    project: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The superuser may write anywhere, so that the answer of the system is made up."""
    monkeypatch.setattr(os, "access", lambda folder, mode: Path(folder) != tmp_path)
    path = config_file(tmp_path, project)
    code, found = checked(capsys, "--config", path)
    assert code == 1 and kinds(found, "fails") == {("closed_folder", "run")}
    assert str(tmp_path) in finding(found, "closed_folder", "run").message
    assert checked(capsys, "--config", path, "--no_output")[0] == 0
    code, found = checked(capsys, "--config", path, "--no_output", "--save_similarity", str(tmp_path / "m.npy"))
    assert code == 1 and "save_similarity" in finding(found, "closed_folder", "run").message


@pytest.mark.parametrize("do_inference", [False, True])
def test_a_checkpoint_that_does_not_fit(
    project: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], do_inference: bool
) -> None:
    config = load_config(None, project)
    model, path = build_trial_model(config).model, tmp_path / "best.safetensors"
    save_tensors(path, model.state_dict(), {"content": "model", "config": config.model_dump_json()})
    words = ("--config", config_file(tmp_path, project, resume=str(path), do_inference=do_inference))
    code, found = checked(capsys, *words)
    assert code == 0, found
    code, found = checked(capsys, *words, "--hidden_dim", "128")
    assert code == 1 and kinds(found, "fails") == {("model", "run")}
    assert "does not fit the model" in finding(found, "model", "run").message
    assert any(check == "long_captions" for check, _ in kinds(found, "fine"))


def test_a_run_that_goes_on(project: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held against the trainer: what it would refuse fails, and nothing in the folder is changed by looking."""
    annotation = json.loads(Path(str(project["train_annot"])).read_text())
    train = tmp_path / "train.json"
    train.write_text(json.dumps(annotation))
    settings = project | {"output_dir": str(tmp_path / "output"), "train_annot": str(train)}
    assert run(settings, tmp_path / "log", "update", 5) == -signal.SIGKILL
    (folder,) = (tmp_path / "output" / "tiny").iterdir()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, found = checked(capsys, "--resume", str(folder))
    assert code == 0 and "goes on after update 3" in finding(found, "going_on", "run").message

    (folder / "lock.json").write_text(json.dumps(this_process()))
    code, found = checked(capsys, "--resume", str(folder))
    assert code == 1 and kinds(found, "fails") == {("locked", "run")}
    assert f"process {os.getpid()}" in finding(found, "locked", "run").message
    (folder / "lock.json").write_bytes(before[folder / "lock.json"])

    annotation["video3"]["sentences"] = ["quite another thing"]
    train.write_text(json.dumps(annotation))
    code, found = checked(capsys, "--resume", str(folder))
    assert code == 1 and kinds(found, "fails") == {("other_data", "run")}
    config = continued_config(load_config(None, {"resume": str(folder)}))
    with pytest.raises(UserError, match="the training data is not what the run in") as refused:
        fit(config, folder)
    assert finding(found, "other_data", "run").message in str(refused.value)
    assert all(path.read_bytes() == content for path, content in before.items() if path.name != "lock.json")


def test_a_run_that_is_finished(project: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(project))
    (tmp_path / "metrics.json").write_text("{}")
    code, found = checked(capsys, "--resume", str(tmp_path))
    assert code == 1 and kinds(found, "fails") == {("finished", "run")}


def test_what_would_be_searched(project: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def search(name: str) -> str:
        choices = {name: {"range": [1e-4, 1e-2]}}
        return config_file(tmp_path, project, optuna_cfg={"n_trials": 3, "opt_params": choices})

    optuna.logging.set_verbosity(optuna.logging.INFO)
    code, found = checked(capsys, "--config", search("learning_rate"))
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR
    assert code == 0 and "3 trials" in finding(found, "search", "run").message
    path = search("learning_rat")
    code, found = checked(capsys, "--config", path)
    refused = finding(found, "search", "run")
    assert code == 1 and refused.severity == "fails" and "learning_rat" in refused.message
    with pytest.raises(UserError) as error:
        describe(load_config(path))
    assert str(error.value) == refused.message


def test_reading_is_timed_with_many_readers(project: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks a second for each video: with too few videos to tell, the start of the readers counts."""
    from adaclip_finetune.check import reading

    for count, workers in ((2, 48), (60, 48), (200, 48), (60, 2)):
        clock = itertools.count()
        monkeypatch.setattr(reading, "time", SimpleNamespace(monotonic=lambda clock=clock: float(next(clock))))
        monkeypatch.setattr(reading, "_SECONDS", 1e9)
        monkeypatch.setattr(reading, "make_loader", lambda dataset, config, batches: iter(batches))
        monkeypatch.setattr(reading, "stop_workers", lambda loader: None)
        config = load_config(None, project | {"num_workers": workers})
        names = [f"video{number}" for number in range(count)]
        assert reading.seconds_a_video(names, None, config, None) == 1.0  # type: ignore[arg-type]


def test_activations_are_counted(project: dict[str, object]) -> None:
    """A batch twice as large needs as much again, in bytes that the backward keeps."""
    from adaclip_finetune.check.steps import _two_steps
    from adaclip_finetune.training.optimizer import build_optimizer

    trial = build_trial_model(load_config(None, project))
    optimizer, _ = build_optimizer(trial.objective, trial.config, 2)
    small, large = (_two_steps(trial, optimizer, size)[2] for size in (4, 8))
    assert 1.8 * small < large < 2.2 * small


def test_a_batch_that_does_not_fit(
    project: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaclip_finetune.check import steps

    real = steps.blank_batch

    def scarce(config: Any, retriever: Any, tokenize: Any, size: int) -> Any:
        if size > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(config, retriever, tokenize, size)

    monkeypatch.setattr(steps, "blank_batch", scarce)
    code, found = checked(capsys, "--config", config_file(tmp_path, project))
    refused = finding(found, "gpu_memory", "run")
    assert code == 1 and "batch_size 4" in refused.message and "--batch_size 2" in refused.message
    code, found = checked(capsys, "--config", config_file(tmp_path, project), "--auto_batch_size")
    assert code == 0 and finding(found, "gpu_memory", "run").severity == "warning"


def test_what_goes_on_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and computing, seconds a batch, on 8 processors of 64."""
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert _together(3.0, 2.0, 0, GPU) == 5.0
    assert _together(3.0, 2.0, 2, GPU) == 3.0
    assert _together(3.0, 2.0, 2, CPU) == 3.0  # 6 + 8 of processor time, 8 at once
    assert _together(3.0, 4.0, 8, CPU) == 5.0  # 24 + 16


def test_a_slow_step_is_extrapolated(project: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    from adaclip_finetune.check import steps

    sizes = []

    def slow(trial: Any, optimizer: Any, size: int) -> tuple[float, float, int]:
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
    """Each time other ones: what lies in no file here."""
    config = load_config(None, project | {"clip_weights": None, "clip_backbone": "RN50-quickgelu:openai"})
    one, other = (build_trial_model(config).model.state_dict() for _ in range(2))
    name = "clip.visual.conv1.weight"
    assert all(tensor.isfinite().all() for tensor in one.values())
    assert one[name].std() > 0 and not torch.equal(one[name], other[name])


def test_what_only_evaluates_is_not_timed(
    project: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(tmp_path, project, do_inference=True)
    code, found = checked(capsys, "--config", path)
    assert (
        code == 0 and set(found["splits"]) == {"test"} and "time" not in {entry["check"] for entry in found["findings"]}
    )
