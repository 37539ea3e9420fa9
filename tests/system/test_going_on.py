"""Runs that are killed, and go on: the result is bit for bit that of a run that never stopped."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from safetensors.torch import load_file

from adaclip_finetune.config import load_config
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training import signals, snapshot
from adaclip_finetune.training.trainer import fit

Project = dict[str, Any]

BERTADAM = {
    "num_epochs": 2,
    "save_every_steps": 2,
    "sampling": "random",
    "concat_captions": "indep-one",
    "save_last": True,
    "gradient_accumulation_steps": 2,
    "batch_size": 2,
}
IBS = {
    "num_epochs": 2,
    "save_every_steps": 1,
    "num_workers": 2,
    "save_last": True,
    "optim": "adamw",
    "peft": {"method": "ibs", "config": {"num_pre_epochs": 1, "retain_ratio": 0.2}},
}
# The loss creates a bias within CLIP, which learns; there is no frame selector.
SIGMOID = {
    "num_epochs": 1,
    "save_every_steps": 1,
    "save_last": True,
    "objective": {"method": "sigmoid"},
    "use_policy": False,
}


@pytest.fixture(scope="module")
def uninterrupted(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Project], Path]:
    """The run folder of these settings, trained without a stop; each once."""
    folders: dict[str, Path] = {}

    def train(settings: Project) -> Path:
        key = json.dumps(settings)
        if key not in folders:
            output = tmp_path_factory.mktemp("uninterrupted")
            assert killed.run({**project, **settings, "output_dir": str(output)}, output / "log") == 0
            folders[key] = only_run(output)
        return folders[key]

    return train


def only_run(output: Path) -> Path:
    (folder,) = (output / "tiny").iterdir()
    return folder


def metrics_lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or a process measures."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds", "videos_per_second", "memory_mib", "eval_seconds")
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


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
        pytest.param(BERTADAM, [("evaluation", 1)], id="while zero-shot is measured"),
        pytest.param(BERTADAM, [("update", 2)], id="before the first save"),
        pytest.param(BERTADAM, [("save", 2)], id="in the middle of a save"),
        pytest.param(BERTADAM, [("pointer", 4)], id="saved but not pointed to"),
        pytest.param(BERTADAM, [("evaluation", 3)], id="in validation"),
        pytest.param(BERTADAM, [("evaluation", 4)], id="in the test"),
        pytest.param(IBS, [("update", 3), ("update", 2)], id="in IBS pre-epochs, with workers, twice in a row"),
        pytest.param(IBS, [("update", 5)], id="after IBS selected"),
        pytest.param(SIGMOID, [("update", 3)], id="with a bias that the loss created"),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
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


def test_sigterm_finishes_the_update_saves_and_asks_to_be_run_again(
    project: Project, uninterrupted: Callable[[Project], Path], tmp_path: Path
) -> None:
    given = {**project, **BERTADAM, "output_dir": str(tmp_path)}
    assert killed.run(given, tmp_path / "log", "update", 3, signal.SIGTERM) == 75
    folder = only_run(tmp_path)
    assert [line["step"] for line in metrics_lines(folder) if line["event"] == "train"] == [1, 2, 3]
    assert json.loads((folder / "last.json").read_text()) == {"snapshot": "last-3"}
    assert f"--resume {folder}" in (tmp_path / "log").read_text()
    assert killed.run({"resume": str(folder)}, tmp_path / "log") == 0
    assert_same_result(uninterrupted(BERTADAM), folder)


def test_a_killed_evaluation_goes_on_with_what_it_embedded(project: Project, tmp_path: Path) -> None:
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


def stopped_run(project: Project, tmp_path: Path, **settings: Any) -> Path:
    """A run folder in which a run died at its third update, update 2 being saved."""
    given = {**project, "save_every_steps": 2, "output_dir": str(tmp_path), **settings}
    assert killed.run(given, tmp_path / "log", "update", 3) == -signal.SIGKILL
    return only_run(tmp_path)


def go_on(folder: Path, **settings: Any) -> None:
    fit(continued_config(load_config(None, {"resume": str(folder), **settings})), folder=folder)


def test_a_snapshot_is_data_and_only_one_is_kept(project: Project, tmp_path: Path) -> None:
    folder = stopped_run(project, tmp_path, save_every_steps=1)
    assert [path.name for path in folder.glob("last*")] == ["last-2", "last.json"]
    assert {path.suffix for path in (folder / "last-2").iterdir()} == {".safetensors", ".json"}
    found = snapshot.load_snapshot(folder)
    assert found is not None and found.step == 2
    assert found.group("model").keys() > {"clip.visual.proj"} and found.group("optimizer")


@pytest.mark.parametrize("failing", ["save_tensors", "flush_folder"])
def test_a_full_disk_leaves_the_last_good_snapshot_and_says_so(
    failing: str, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped_run(project, tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, failing, full)
    with pytest.raises(UserError, match=r"(?s)update 3 could not be saved: .*No space left") as refused:
        go_on(folder)
    assert f"What was saved before it is whole: {folder / 'last-2'} (--resume {folder})" in str(refused.value)
    assert not list(folder.glob(".last*"))
    monkeypatch.undo()
    go_on(folder)
    assert (folder / "metrics.json").exists()


def test_settings_of_a_run_that_goes_on(project: Project, tmp_path: Path) -> None:
    folder = stopped_run(project, tmp_path)
    with pytest.raises(
        UserError, match=r"(?s)with its own settings.*learning_rate is 0\.5 here, and 0\.001 in the run\nLeave"
    ):
        go_on(folder, learning_rate=0.5)
    go_on(folder, num_workers=1, learning_rate=1e-3)
    with pytest.raises(UserError, match=rf"is finished .*--resume {folder}/best\.safetensors"):
        go_on(folder)


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run folder: it holds no config\.json"):
        continued_config(load_config(None, {"resume": str(tmp_path)}))


def test_evaluating_a_run_that_trains_says_how(project: Project, tmp_path: Path) -> None:
    folder = stopped_run(project, tmp_path)
    with pytest.raises(UserError, match=r"--do_inference --resume .*best\.safetensors"):
        continued_config(load_config(None, {"resume": str(folder), "do_inference": True}))


def test_other_data_is_refused(project: Project, tmp_path: Path) -> None:
    folder = stopped_run(project, tmp_path)
    other = tmp_path / "other.json"
    before = (folder / "metrics.jsonl").read_bytes()
    for name, words in (("train_annot", "training"), ("val_annot", "validation"), ("test_annot", "test")):
        annotation = json.loads(Path(project[name]).read_text())
        annotation["video5"]["sentences"] = ["something else"]
        other.write_text(json.dumps(annotation))
        with pytest.raises(UserError, match=rf"the {words} data is not what the run .* began with"):
            go_on(folder, **{name: str(other)})
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_file_of_a_snapshot_is_no_checkpoint(project: Project, tmp_path: Path) -> None:
    folder = stopped_run(project, tmp_path)
    state = folder / "last-2" / "state.safetensors"
    with pytest.raises(UserError, match=rf"belongs to a run that can go on: --resume {folder}$"):
        fit(load_config(None, {**project, "resume": str(state), "no_output": True}))


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_a_launcher_may_signal_twice_and_only_a_person_stops_at_once(
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


@pytest.mark.parametrize("broken", ["last.json", "last-2/state.json", "last-2/state.safetensors"])
def test_a_broken_snapshot_is_named(broken: str, project: Project, tmp_path: Path) -> None:
    folder = stopped_run(project, tmp_path)
    (folder / broken).write_bytes(b"{")
    with pytest.raises(UserError, match=r"resume: what .*last\.json points to cannot be read"):
        go_on(folder)
