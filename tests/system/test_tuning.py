"""Whole studies on a dozen tiny videos: what they try, write, print and refuse, and how they continue."""

import csv
import json
import os
import shutil
import signal
import weakref
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from PIL import Image
from tuned import quick_trial, settings, states, study_of, use_quick_trials

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.objectives import contrastive
from adaclip_finetune.training import trainer
from adaclip_finetune.training.signals import Interrupted
from adaclip_finetune.tuning import run as tuning_run
from adaclip_finetune.tuning.report import StudyFolder, best_trial
from adaclip_finetune.tuning.run import FINAL_RUN, tune

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

Project = dict[str, Any]
PICTURES = {"history", "intermediate_values", "importances", "slices", "parallel_coordinates"}


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_run, "draw", lambda *_: None)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of milliseconds: what is tested is the study, not the training."""
    use_quick_trials(monkeypatch.setattr)


def folder_of(config: Config) -> Path:
    return Path(study_of(config).user_attrs["folder"])


def rows(config: Config) -> list[dict[str, str]]:
    with (folder_of(config) / "study.csv").open() as file:
        return list(csv.DictReader(file))


def stop_at_loss(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Send SIGTERM before loss `number` (from 1); there are 3 an epoch. Return a list that grows with the losses."""
    real, calls = contrastive.contrastive_loss, list[int]()

    def loss(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(contrastive, "contrastive_loss", loss)
    return calls


@pytest.mark.usefixtures("no_pictures")
def test_a_study_with_its_final_run(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trials see validation alone; the final run has the best values, and is tested once."""
    config = settings(project, tmp_path, {"n_trials": 2}, do_training_af_optuna=True)
    tune(config)
    study, folder = study_of(config), folder_of(config)
    assert states(config) == ["COMPLETE"] * 2 and study.study_name == "tiny-full"
    for trial in study.trials:
        where = folder / f"trial-{trial.number:04d}"
        lines = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
        curve = {line["epoch"]: line["metrics"]["t2v"]["R@1"] for line in lines if line["event"] == "validation"}
        assert trial.intermediate_values == curve and list(curve) == [1, 2]
        assert trial.value == max(curve.values()) == curve[trial.user_attrs["best_epoch"]]
        assert json.loads((where / "config.json").read_text())["learning_rate"] == trial.params["learning_rate"]
        assert trial.user_attrs["trainable_parameters"] > 0 and trial.user_attrs["seconds"] > 0
        assert {line["event"] for line in lines}.isdisjoint({"zero_shot", "test"})
    best = study.best_trial
    assert [path.parent.name for path in folder.glob("*/best.safetensors")] == [f"trial-{best.number:04d}"]
    assert [(float(row["value"]), float(row["learning_rate"])) for row in rows(config)] == [
        (trial.value, trial.params["learning_rate"]) for trial in study.trials
    ]
    found = load_config(folder / "best_config.json")
    assert (found.optuna_cfg, found.learning_rate) == (None, best.params["learning_rate"])
    assert found.test_annot == config.test_annot
    out = capsys.readouterr().out
    assert out.index("zero-shot on validation") < out.index("trial 0: learning_rate")
    assert f"best: trial {best.number}, t2v.R@1 {best.value:.1f} on validation (zero-shot " in out

    final = study.user_attrs[FINAL_RUN]
    assert final["trial"] == best.number
    run = Path(final["folder"])
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["evaluated_on"] == "test" and metrics["zero_shot"] is not None
    assert load_config(run / "config.json").learning_rate == best.params["learning_rate"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    tune(config)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["TPESampler", "CmaEsSampler", "GPSampler"])
def test_the_values_of_a_study_follow_from_the_seed(project: Project, tmp_path: Path, name: str) -> None:
    found = []
    for number, seed in enumerate((1, 1, 2)):
        (folder := tmp_path / str(number)).mkdir()
        study = {"n_trials": 4, "sampler": {"name": name, "n_startup_trials": 2}, "storage": f"{folder}/journal"}
        tune(config := settings(project, folder, study, seed=seed, no_output=True, num_epochs=1))
        found.append([trial.params["learning_rate"] for trial in study_of(config).trials])
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) == 4


@pytest.mark.usefixtures("quick")
def test_an_interrupted_study_continues(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The interrupted values are tried again, and a later command draws values of its own."""
    calls: list[int] = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted(signal.SIGTERM)
        return quick_trial(*arguments)

    monkeypatch.setattr(tuning_run, "run_trial", interrupted)
    tune(settings(project, tmp_path, {"n_trials": 1}))
    config = settings(project, tmp_path, num_workers=1)
    with pytest.raises(Interrupted) as stopped:
        tune(config)
    assert stopped.value.exit_code == 75 and "same command continues" in capsys.readouterr().out
    for _ in range(2):
        tune(config)
    assert states(config) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    rates = [trial.params["learning_rate"] for trial in study_of(config).trials]
    assert rates[1] == rates[2] and len(set(rates)) == 3
    assert [row["reason"] for row in rows(config)] == ["", "interrupted", "", ""]
    assert "4 trials: 3 completed, 0 pruned, 1 failed" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "tiny").iterdir())) == 1, "all commands of a study write into one folder"


@pytest.mark.usefixtures("no_pictures")
def test_a_signal_while_training_ends_a_trial_and_the_final_run_continues_where_it_was(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(project, tmp_path, {"n_trials": 1}, num_epochs=1, do_training_af_optuna=True)
    stop_at_loss(2, monkeypatch)  # in the trial
    with pytest.raises(Interrupted):
        tune(config)
    calls = stop_at_loss(5, monkeypatch)  # the first three are those of the trial
    with pytest.raises(Interrupted):
        tune(config)
    tune(config)
    assert states(config) == ["FAIL", "COMPLETE"]
    assert study_of(config).user_attrs[FINAL_RUN]["trial"] == 1
    assert len(calls) == 6, "no update is made twice"


@pytest.mark.usefixtures("quick")
def test_values_that_the_settings_refuse_are_pruned_with_the_reason(project: Project, tmp_path: Path) -> None:
    """The grid ends the study before n_trials, and is not begun again."""
    grid = {"opt_params": {"top_k": {"choices": [2, 7]}}, "sampler": {"name": "GridSampler"}}
    config = settings(project, tmp_path, grid)
    tune(config)
    tune(config)
    assert len(states(config)) == 2
    trials = {trial.params["top_k"]: trial for trial in study_of(config).trials}
    assert {value: trial.state.name for value, trial in trials.items()} == {2: "COMPLETE", 7: "PRUNED"}
    assert trials[7].user_attrs["reason"].startswith("refused: top_k 7")


@pytest.mark.usefixtures("quick")
def test_pruners_are_asked_after_every_epoch(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def only_the_second(_: Any, study: Any, trial: Any) -> bool:
        asked.append(list(trial.intermediate_values))
        return trial.number == 1

    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", only_the_second)
    config = settings(project, tmp_path)
    tune(config)
    assert states(config) == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert asked == [[1], [1, 2], [1], [1], [1, 2]]
    assert study_of(config).trials[1].user_attrs["reason"].startswith("pruned after epoch 1")


@pytest.mark.usefixtures("quick")
def test_a_study_keeps_to_its_settings_and_captions(project: Project, tmp_path: Path) -> None:
    annotation = tmp_path / "val.json"
    shutil.copy(project["val_annot"], annotation)
    given = {"num_epochs": 1, "val_annot": str(annotation)}
    config = settings(project, tmp_path, {"n_trials": 1}, **given)
    tune(config)
    tune(settings(project, tmp_path, {"n_trials": 2, "pruner": "none"}, **given, num_workers=1))
    shutil.copy(project["test_annot"], annotation)
    cases: list[tuple[Any, Any, str]] = [
        ({"weight_decay": 0.3}, {}, "weight_decay is 0.3 here but 0.2 in the study"),
        ({"precision": "bf16"}, {}, "precision"),
        ({}, {"objective": "v2t.R@1"}, "optuna_cfg.objective"),
        ({}, {"opt_params": {"coef_lr": {"range": [0, 1]}}}, "optuna_cfg.opt_params"),
        ({}, {}, "the content of val_annot"),
    ]
    for change, optuna_cfg, told in cases:
        with pytest.raises(UserError, match="study_name") as error:
            tune(settings(project, tmp_path, optuna_cfg, **given, **change))
        assert told in str(error.value) and len(states(config)) == 2
    assert len(list((tmp_path / "out" / "tiny").iterdir())) == 1


@pytest.mark.usefixtures("no_pictures")
def test_what_cannot_be_used_leaves_neither_study_nor_folder(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = tmp_path / "trained"
    run = trainer.fit(load_config(None, {**project, "num_epochs": 1, "output_dir": str(trained)})).folder
    config = settings(project, tmp_path, resume=str(run) + "/best.safetensors", mlp_hidden_dim=16)
    with pytest.raises(UserError, match="does not fit the model"):
        tune(config)
    with pytest.raises(UserError, match="output_dir"):
        tune(settings(project, tmp_path, output_dir=project["val_annot"]))
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "h", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="torchrun"):
        tune(settings(project, tmp_path))
    assert config.optuna_cfg is not None
    assert optuna.get_all_study_names(config.optuna_cfg.storage) == [] and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick")
def test_ranks_are_minimized_and_the_earliest_of_equals_keeps_the_weights(project: Project, tmp_path: Path) -> None:
    config = settings(project, tmp_path, {"objective": "t2v.MeanR"})
    tune(config)
    study, folder = study_of(config), folder_of(config)
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    lowest = min(trial.value for trial in study.trials)
    study.add_trial(optuna.create_trial(value=lowest))
    (folder / "trial-0003").mkdir()
    (folder / "trial-0003" / "best.safetensors").touch()
    StudyFolder(config, study).write()
    best = best_trial(study)
    assert best is not None and best.number < 3 and best.value == lowest
    assert [path.parent.name for path in folder.glob("*/best.safetensors")] == [f"trial-{best.number:04d}"]


@pytest.mark.parametrize("ending", ["failed", "pruned"])
@pytest.mark.usefixtures("no_pictures")
def test_a_trial_that_fails_or_is_pruned_leaves_no_model_behind(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    made, alive = list[weakref.ref[Any]](), list[int]()
    real = trainer.open_model

    def counted(*arguments: Any, **named: Any) -> Any:
        alive.append(sum(model() is not None for model in made))
        session = real(*arguments, **named)
        made.append(weakref.ref(session.model))
        return session

    def out_of_memory(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(trainer, "open_model", counted)
    config = settings(project, tmp_path, {"n_trials": 2}, num_epochs=1)
    if ending == "failed":
        monkeypatch.setattr(tuning_run, "FAILURES", 2)
        monkeypatch.setattr(contrastive, "contrastive_loss", out_of_memory)
        with pytest.raises(UserError, match="memory"):
            tune(config)
    else:
        monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", lambda *_: True)
        tune(config)
    assert alive == [0, 0, 0]  # the first is that of zero-shot CLIP
    assert study_of(config).trials[-1].user_attrs["trainable_parameters"] > 0
    if ending == "failed":
        assert states(config) == ["FAIL"] * 2 and all("memory" in row["reason"] for row in rows(config))
        assert "Traceback" in (folder_of(config) / "trial-0001" / "train.log").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_what_makes_figures_doubtful_is_told(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validation on the test captions, and a gallery with a missing video; no_output leaves nothing but the study."""
    captions = json.loads(Path(project["val_annot"]).read_text())
    annotation = tmp_path / "val.json"
    annotation.write_text(json.dumps({**captions, "gone": {"sentences": ["nobody saw it"]}}))
    given = {"val_annot": str(annotation), "test_annot": str(annotation), "skip_missing": True, "num_epochs": 1}
    tune(config := settings(project, tmp_path, {"n_trials": 1}, no_output=True, **given))
    out = capsys.readouterr().out
    assert out.count("selected on test") == 2
    assert "WITHOUT 1 of 7 videos" in out
    assert states(config) == ["COMPLETE"] and not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("error")
def test_a_study_is_drawn_when_there_is_something_to_compare_and_no_style_stays(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    style = dict(matplotlib.rcParams)
    study = optuna.create_study(study_name="s", direction="maximize")
    space: Any = {"learning_rate": optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True)}
    for rate, found in ((1e-3, 1.0), (1e-4, 1.0), (1e-2, 40.0)):
        tuning_run.draw(study, tmp_path, "t2v.R@1")
        assert not list(tmp_path.iterdir())
        facts: Any = {"params": {"learning_rate": rate}, "distributions": space, "intermediate_values": {1: found}}
        study.add_trial(optuna.create_trial(value=found, **facts))
    study.add_trial(optuna.create_trial(state=TrialState.FAIL, params={}, distributions={}))
    tuning_run.draw(study, tmp_path, "t2v.R@1")
    assert {path.stem for path in tmp_path.iterdir()} == PICTURES
    assert dict(matplotlib.rcParams) == style
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width > 800 and len(picture.getcolors(1 << 24) or []) > 20
