"""Runs that are killed and resumed: the result is bit for bit that of a run that never stopped."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from comparing import only_run
from safetensors.torch import load_file

from adaclip_finetune.config import load_config
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training import checkpoint, signals
from adaclip_finetune.training.trainer import fit

Project = dict[str, Any]

BERTADAM = {
    **{"num_epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 2, "save_every_steps": 2, "save_last": True},
    **{"sampling": "random", "concat_captions": "indep-one"},
}
IBS = {
    **{"num_epochs": 2, "num_workers": 2, "optim": "adamw", "save_every_steps": 1, "save_last": True},
    "peft": {"method": "ibs", "config": {"num_pre_epochs": 1, "retain_ratio": 0.2}},
}
# The loss creates a bias within CLIP, which learns; there is no frame selector.
SIGMOID = {
    **{"num_epochs": 1, "save_every_steps": 1, "save_last": True},
    **{"objective": {"method": "sigmoid"}, "use_policy": False},
}


@pytest.fixture(scope="module")
def uninterrupted(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Project], Path]:
    """Return the run folder of these settings, trained without a stop, once for each."""
    folders: dict[str, Path] = {}

    def train(settings: Project) -> Path:
        key = json.dumps(settings)
        if key not in folders:
            output = tmp_path_factory.mktemp("uninterrupted")
            assert killed.run({**project, **settings, "output_dir": str(output)}, output / "log") == 0
            folders[key] = only_run(output)
        return folders[key]

    return train


@pytest.fixture(scope="module")
def stopped_once(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its fifth update, the second of its second epoch; update 4 was saved."""
    output = tmp_path_factory.mktemp("stopped")
    given = {**project, "save_every_steps": 2, "output_dir": str(output)}
    assert killed.run(given, output / "log", "update", 5) == -signal.SIGKILL
    return only_run(output)


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A copy of `stopped_once` to resume."""
    return Path(shutil.copytree(stopped_once, tmp_path / "stopped", ignore=shutil.ignore_patterns("lock.json")))


def resume(folder: Path, **settings: Any) -> None:
    fit(continued_config(load_config(None, {"resume": str(folder), **settings})), folder=folder)


def metrics_lines(folder: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without what a clock or a process measures."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds", "videos_per_second", "memory_mib", "eval_seconds")
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_result(one: Path, other: Path) -> None:
    for name in ("best.safetensors", "last.safetensors", "adapter.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert metrics_lines(one) == metrics_lines(other)
    assert json.loads((one / "metrics.json").read_text()) == json.loads((other / "metrics.json").read_text())
    left = {path.name for path in other.iterdir()} ^ {path.name for path in one.iterdir()}
    assert not left, "a snapshot, a lock or a half-written file was left behind"


@pytest.mark.parametrize(
    ("settings", "deaths"),
    [
        pytest.param(BERTADAM, [("evaluation", 1)], id="during zero-shot"),
        pytest.param(BERTADAM, [("update", 2)], id="before the first snapshot"),
        pytest.param(BERTADAM, [("save", 2)], id="while a snapshot is written"),
        pytest.param(BERTADAM, [("saved", 4)], id="before the older snapshot is deleted"),
        pytest.param(BERTADAM, [("evaluation", 3)], id="during validation"),
        pytest.param(BERTADAM, [("evaluation", 4)], id="during the test"),
        pytest.param(IBS, [("update", 3), ("update", 2)], id="twice in IBS pre-epochs, with workers"),
        pytest.param(IBS, [("update", 5)], id="after IBS selected"),
        pytest.param(SIGMOID, [("update", 3)], id="with a bias that the loss created"),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(
    settings: Project,
    deaths: list[tuple[str, int]],
    project: Project,
    uninterrupted: Callable[[Project], Path],
    tmp_path: Path,
) -> None:
    given = {**project, **settings, "output_dir": str(tmp_path)}
    for place, call in deaths:
        assert killed.run(given, tmp_path / "log", place, call) == -signal.SIGKILL
        given = {"resume": str(only_run(tmp_path))}
    assert killed.run(given, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert_same_result(uninterrupted(settings), only_run(tmp_path))


def test_sigterm_finishes_the_update_saves_and_exits_with_75(
    project: Project, uninterrupted: Callable[[Project], Path], tmp_path: Path
) -> None:
    given = {**project, **BERTADAM, "output_dir": str(tmp_path)}
    assert killed.run(given, tmp_path / "log", "update", 3, signal.SIGTERM) == 75
    folder = only_run(tmp_path)
    assert [line["step"] for line in metrics_lines(folder) if line["event"] == "train"] == [1, 2, 3]
    assert [path.name for path in folder.glob("last*")] == ["last-3"]
    assert f"--resume {folder}" in (tmp_path / "log").read_text()
    assert killed.run({"resume": str(folder)}, tmp_path / "log") == 0
    assert_same_result(uninterrupted(BERTADAM), folder)


def test_a_killed_evaluation_continues_with_its_finished_batches(project: Project, tmp_path: Path) -> None:
    given = {**project, "do_inference": True, "val_batch_size": 2}
    whole, parted = ({**given, "output_dir": str(tmp_path / name)} for name in ("whole", "parted"))
    assert killed.run(whole, tmp_path / "log") == 0
    assert killed.run(parted, tmp_path / "log", "embedded", 3) == -signal.SIGKILL
    folder, other = only_run(tmp_path / "parted"), only_run(tmp_path / "whole")
    kept = {path.name for path in folder.glob("embeddings/*/*.safetensors")}
    assert kept == {"videos-000000.safetensors", "videos-000001.safetensors"}
    assert killed.run({"resume": str(folder)}, tmp_path / "log") == 0
    assert json.loads((folder / "metrics.json").read_text()) == json.loads((other / "metrics.json").read_text())
    assert metrics_lines(folder) == metrics_lines(other)
    assert not (folder / "embeddings").exists()


def test_a_full_disk_leaves_the_older_snapshot(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for failing in ("save_tensors", "flush_folder"):
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, failing, full)
            with pytest.raises(UserError, match=r"update 5 could not be saved.*No space left") as refused:
                resume(stopped, save_every_steps=1)
        assert str(stopped / "last-4") in str(refused.value) and f"--resume {stopped}" in str(refused.value)
        assert not list(stopped.glob(".last*"))
    # A crash while older snapshots are deleted leaves a part of one beside the newest.
    (stopped / "last-2").mkdir()
    (stopped / ".last-6.part").mkdir()
    resume(stopped)
    assert (stopped / "metrics.json").exists() and not list(stopped.glob("*last*"))


def test_only_settings_that_decide_no_figure_may_change(stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"learning_rate is 0\.5"):
        resume(stopped, learning_rate=0.5)
    with pytest.raises(UserError, match=r"--do_inference --resume .*best\.safetensors"):
        resume(stopped, do_inference=True)
    resume(stopped, num_workers=1, learning_rate=1e-3)
    with pytest.raises(UserError, match=rf"is finished .*--resume {stopped}/best\.safetensors"):
        resume(stopped)
    with pytest.raises(UserError, match=r"config\.json"):
        resume(tmp_path)


@pytest.mark.parametrize(
    ("setting", "name"), [("train_annot", "training"), ("val_annot", "validation"), ("test_annot", "test")]
)
def test_other_data_is_refused(setting: str, name: str, stopped: Path, project: Project, tmp_path: Path) -> None:
    annotation = json.loads(Path(project[setting]).read_text())
    annotation["video5"]["sentences"] = ["something else"]
    (tmp_path / "other.json").write_text(json.dumps(annotation))
    with pytest.raises(UserError, match=rf"resume: the {name} data"):
        resume(stopped, **{setting: str(tmp_path / "other.json")})


@pytest.mark.parametrize(("lost", "how"), [
    ("last-4", "missing"),
    ("last-4/state.json", "missing"),
    ("last-4/state.json", "damaged"),
    ("last-4/state.safetensors", "damaged"),
    ("metrics.jsonl", "missing"),
])  # fmt: skip
def test_what_is_left_of_a_run_is_not_overwritten(lost: str, how: str, stopped: Path) -> None:
    path = stopped / lost
    if path.is_dir():
        shutil.rmtree(path)
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:1])
    before = content(stopped)
    with pytest.raises(UserError, match=r"resume: .*(last-|metrics\.jsonl)"):
        resume(stopped)
    left = content(stopped)
    assert {name: left[name] for name in before if name in left} == before


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_launchers_signal_twice_and_only_a_person_stops_at_once(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)  # in the background it is ignored
    clock = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(clock))
    finished = []

    def work() -> None:
        with signals.StopSignals() as stop, stop.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            finished.append(True)

    with pytest.raises(signals.Interrupted) as stopped:
        work()
    assert bool(finished) == (seconds == 0)
    assert stopped.value.exit_code == 130
