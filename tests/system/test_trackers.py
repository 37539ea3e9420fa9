"""Who gets the numbers of a run: TensorBoard, and through accelerate Weights & Biases, MLflow and Trackio."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tuned
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training import run_folder
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.trainer import fit
from adaclip_finetune.tuning import run as tuning

Project = dict[str, Any]


class Recorder:
    """Stand in for accelerate's tracker of Weights & Biases: note what it is given."""

    started: list["Recorder"]
    fails_at = ""

    def __init__(self, project: str, **arguments: Any) -> None:
        self.project, self.arguments, self.settings = project, arguments, dict[str, Any]()
        self.logged, self.exit_codes = list[tuple[int, dict[str, float]]](), list[int]()
        self.tracker, self.id = self, arguments["id"] or f"id-{arguments['name']}"

    def start(self) -> None:
        if self.fails_at == "start":
            raise RuntimeError("no API key")
        self.started.append(self)

    def store_init_configuration(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def log(self, values: dict[str, float], step: int) -> None:
        if self.fails_at == "log":
            raise ConnectionError("no route to host")
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    Recorder.started = []
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    return Recorder


def short(folder: Path, *trackers: str, step: int = 0, **settings: Any) -> Path:
    """Write an update and a validation into a new run folder in `folder`, or into `folder` if `step` is above 0."""
    PartialState()  # as a run has it; accelerate's trackers ask it which process they are in
    config = load_config(None, {"output_dir": str(folder), "tracker": trackers or ["wandb"], **settings})
    with RunFolder(config) as run:
        if step:
            run.lock(folder)
            run.reopen(folder, step, size=0)
        else:
            run.open(config, "cpu")
        run.record("train", step + 1, loss=0.5, lr={"clip": 1e-3})
        run.record("validation", step + 1, metrics={"t2v": {"R@1": 50.0}})
        assert run.path is not None
        return run.path


def test_a_whole_run_gives_its_numbers_to_all_trackers(
    project: Project, tmp_path: Path, recorder: type[Recorder]
) -> None:
    given = {**project, "output_dir": str(tmp_path), "num_epochs": 1, "tracker": ["tensorboard", "wandb"]}
    folder = fit(load_config(None, given)).folder
    assert folder is not None
    (run,) = recorder.started
    assert (run.project, run.arguments["name"], run.arguments["group"]) == ("tiny", folder.name, None)
    assert run.settings["batch_size"] == project["batch_size"] and run.settings["peft.method"] == "full"
    assert run.exit_codes == [0]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in run.logged] == [line["step"] for line in lines]
    logged = {name: value for _, values in run.logged for name, value in values.items()}
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    assert [values["train/loss"] for _, values in run.logged if "train/loss" in values] == losses
    (validation,) = (line["metrics"] for line in lines if line["event"] == "validation")
    assert logged["validation/metrics/t2v/R_at_1"] == validation["t2v"]["R@1"]
    assert {"train/lr/other_decay", "zero_shot/metrics/t2v/R_at_1", "finetuned/metrics/v2t/MedR"} <= logged.keys()
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {name.replace("@", "_at_") for name in events.Tags()["scalars"]} == logged.keys()
    assert [scalar.value for scalar in events.Scalars("train/loss")] == pytest.approx(losses)
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [1, 2, 3]
    assert main(["evaluate", str(folder), "--annot", project["test_annot"]]) == 0
    assert len(recorder.started) == 1, "evaluating a run tracks nothing"


def test_a_resumed_run_goes_on_in_the_same_run_of_the_tracker(tmp_path: Path, recorder: type[Recorder]) -> None:
    folder = short(tmp_path)
    short(folder, step=1)
    short(folder, step=1)  # repeats an update that the tracker has
    first, second, third = recorder.started
    assert (first.arguments["id"], second.arguments["id"]) == (None, first.id)
    assert first.settings and not second.settings, "stored once"
    assert [[step for step, _ in run.logged] for run in (first, second, third)] == [[1, 1], [2, 2], []]


def test_a_run_that_does_not_reach_its_end_is_marked(tmp_path: Path, recorder: type[Recorder]) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        RunFolder(load_config(None, {"tracker": ["wandb"]}), trial=tmp_path / "t") as run,
    ):
        run.open(load_config(None, {"tracker": ["wandb"]}), "cpu")
        raise ZeroDivisionError
    assert recorder.started[0].exit_codes == [1]


def test_trials_are_runs_with_their_number_and_without_the_password(
    project: Project, tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "run_trial", tuned.quick_trial)
    monkeypatch.setattr(tuned.study, "validation_zero_shot", lambda *_: None)
    tuning.tune(tuned.settings(project, tmp_path, {"n_trials": 2}, tracker=["tensorboard", "wandb"]))
    (study,) = (tmp_path / "out" / "tiny").iterdir()
    assert [run.arguments["name"] for run in recorder.started] == [f"tiny/{study.name}/trial-000{n}" for n in (0, 1)]
    assert {run.arguments["group"] for run in recorder.started} == {f"tiny/{study.name}"}
    assert recorder.started[0].settings["learning_rate"] != recorder.started[1].settings["learning_rate"]
    assert not any("sqlite" in str(value) for value in recorder.started[0].settings.values())
    assert not list(study.rglob("tensorboard"))


def test_a_tracker_that_fails_ends_no_run(
    tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recorder, "fails_at", "log")
    folder = short(tmp_path)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().out.count("no route to host") == 1
    assert recorder.started[0].exit_codes == [0], "closed all the same"


def test_a_tracker_that_does_not_start_refuses_the_run(
    tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "fails_at", "start")
    with pytest.raises(UserError, match="wandb does not start: no API key"):
        short(tmp_path)
    assert not list((tmp_path / "videos").iterdir()), "no folder is left"


def test_only_the_first_process_tracks(
    tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "is_main", lambda: False)
    config = load_config(None, {"output_dir": str(tmp_path), "tracker": ["wandb"]})
    with RunFolder(config) as run:
        run.open(config, "cpu")
        run.record("train", 1, loss=0.5)
    assert not recorder.started


def test_a_missing_package_is_named_before_anything_loads(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaclip_finetune.config.paths.find_spec", lambda name: None if name == "mlflow" else True)
    given = [
        "--train_annot",
        project["train_annot"],
        "--val_annot",
        project["val_annot"],
        "--tracker",
        "wandb",
        "mlflow",
    ]
    assert main(["train", *given, "--frames_dir", project["frames_dir"]]) == 2
    assert "adaclip-finetune[mlflow]" in capsys.readouterr().err


# ---- the real ones, without a network ----


def real(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed: pip install .[{name}]")


@real("wandb")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = short(tmp_path, "wandb", dataset="mine")
    short(folder, "wandb", step=1, dataset="mine")
    number = json.loads((folder / "trackers.json").read_text())["wandb"]
    parts = list((folder / "wandb").glob(f"offline-run-*-{number}"))
    assert parts, "a resumed run has the same id"
    logged = b"".join(path.read_bytes() for path in folder.rglob(f"run-{number}.wandb"))
    for text in ("mine", folder.name, "learning_rate", "train/loss", "validation/metrics/t2v/R_at_1"):
        assert text.encode() in logged


@real("mlflow")
def test_mlflow_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    folder = short(tmp_path, "mlflow", dataset="mine")
    short(folder, "mlflow", step=1, dataset="mine", n_display=7)
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'mine'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (folder.name, "FINISHED")
    assert run.data.params["batch_size"] == "32"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(1, 0.5), (2, 0.5)]
    assert run.data.metrics["validation/metrics/t2v/R_at_1"] == 50


@real("trackio")
def test_trackio_in_a_folder(tmp_path: Path) -> None:
    """Trackio reads the place of its files when it is imported, so this is a process of its own."""
    code = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from pathlib import Path
from test_trackers import short
folder = short(Path({str(tmp_path)!r}), "trackio", dataset="mine")
short(folder, "trackio", step=1, dataset="mine")
from trackio.sqlite_storage import SQLiteStorage
assert SQLiteStorage.get_runs("mine") == [folder.name]
rows = SQLiteStorage.get_logs("mine", folder.name)
assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [(1, 0.5), (2, 0.5)], rows
settings = SQLiteStorage.get_run_config("mine", folder.name)
assert settings["batch_size"] == 32 and "allow_val_change" not in settings
"""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
