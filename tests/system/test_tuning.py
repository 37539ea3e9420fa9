"""Whole searches on a dozen tiny videos: what they try, print, write, refuse, and how they go on."""

import csv
import json
import os
import shutil
import signal
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.objectives import contrastive
from adaclip_finetune.training import trainer
from adaclip_finetune.training.signals import Interrupted
from adaclip_finetune.tuning import search as searching
from adaclip_finetune.tuning.folder import StudyFolder, best_trial, order
from adaclip_finetune.tuning.search import search
from adaclip_finetune.tuning.space import search_space
from adaclip_finetune.tuning.storage import open_storage
from adaclip_finetune.tuning.study import open_study

Project = dict[str, Any]
SPACE = {"learning_rate": {"range": [1e-5, 1e-2], "log": True}}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Drawing takes longer than such a search; test_tuning_pictures.py draws."""
    monkeypatch.setattr(searching, "draw_study", lambda study, folder, _: (folder / "history.png").touch())
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


def settings(project: Project, tmp_path: Path, optuna_cfg: dict[str, Any] | None = None, **others: Any) -> Config:
    cfg = {"n_trials": 3, "storage": f"sqlite:///{tmp_path}/o.db", "opt_params": SPACE, **(optuna_cfg or {})}
    return load_config(None, {**project, "output_dir": str(tmp_path / "out"), **others, "optuna_cfg": cfg})


def study_of(config: Config) -> optuna.Study:
    assert config.optuna_cfg is not None
    return optuna.load_study(study_name=None, storage=config.optuna_cfg.storage)


def folder_of(config: Config) -> Path:
    return Path(study_of(config).user_attrs["folder"])


def rows(config: Config) -> list[dict[str, str]]:
    with (folder_of(config) / "study.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_search(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(project, tmp_path)
    search(config)
    study, folder = study_of(config), folder_of(config)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    assert study.study_name == "tiny-full"
    best = study.best_trial
    for trial in study.trials:
        where = folder / f"trial-{trial.number:04d}"
        lines = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
        curve = {line["epoch"]: line["metrics"]["t2v"]["R@1"] for line in lines if line["event"] == "validation"}
        assert trial.intermediate_values == curve and list(curve) == [1, 2]
        assert trial.value == max(curve.values()) == curve[trial.user_attrs["best_epoch"]]
        assert json.loads((where / "config.json").read_text())["learning_rate"] == trial.params["learning_rate"]
        assert trial.user_attrs["trainable_parameters"] > 0 and trial.user_attrs["seconds"] > 0
        assert {line["event"] for line in lines}.isdisjoint({"zero_shot", "test"})
        assert not (where / "tensorboard").exists()
    assert [path.parent.name for path in folder.glob("*/best.safetensors")] == [f"trial-{best.number:04d}"]
    table = rows(config)
    assert [float(row["value"]) for row in table] == [trial.value for trial in study.trials]
    assert [float(row["learning_rate"]) for row in table] == [trial.params["learning_rate"] for trial in study.trials]
    found = load_config(folder / "best_config.json")
    assert found.optuna_cfg is None and found.learning_rate == best.params["learning_rate"]
    assert found.test_annot == config.test_annot
    out = capsys.readouterr().out
    assert out.index("zero-shot on validation") < out.index("trial 0 (1 of 3): learning_rate")
    assert f"best: trial {best.number}, t2v.R@1 {best.value:.1f} on validation" in out
    assert "3 trials: 3 completed, 0 pruned, 0 failed" in out
    assert f"python train.py --config {folder / 'best_config.json'}" in out


def test_the_same_command_goes_on_to_the_number_of_trials(project: Project, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    search(settings(project, whole))
    for n_trials in (1, 3, 3):
        config = settings(project, parts, {"n_trials": n_trials}, num_workers=1)
        search(config)
    one, other = study_of(settings(project, whole)), study_of(config)
    assert [(trial.params, trial.value) for trial in other.trials] == [
        (trial.params, trial.value) for trial in one.trials
    ]
    assert len(other.trials) == 3
    assert len(list((parts / "out" / "tiny").iterdir())) == 1, "all commands of a study write into one folder"


def test_what_the_settings_refuse_is_pruned(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"top_k": {"choices": [2, 7]}}
    config = settings(project, tmp_path, {"opt_params": space, "sampler": {"name": "GridSampler"}})
    search(config)
    trials = {trial.params["top_k"]: trial for trial in study_of(config).trials}
    assert (trials[2].state, trials[7].state) == (TrialState.COMPLETE, TrialState.PRUNED)
    assert len(trials) == 2, "a grid of two points has no third trial"
    assert "refused: top_k 7 is more than num_frm 6" in trials[7].user_attrs["reason"]
    assert "refused: top_k 7 is more than num_frm 6" in capsys.readouterr().out


def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = contrastive.contrastive_loss, list[int]()

    def no_memory_at_first(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(*args)

    monkeypatch.setattr(contrastive, "contrastive_loss", no_memory_at_first)
    config = settings(project, tmp_path)
    search(config)
    failed, *others = study_of(config).trials
    assert failed.state == TrialState.FAIL and "out of memory" in failed.user_attrs["reason"]
    assert [trial.state for trial in others] == [TrialState.COMPLETE] * 2
    assert "FAILED: out of memory" in (folder_of(config) / "trial-0000" / "train.log").read_text()
    assert [row["state"] for row in rows(config)] == ["fail", "complete", "complete"]


def test_five_failures_in_a_row_end_the_search(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("nothing works today")

    monkeypatch.setattr(contrastive, "contrastive_loss", broken)
    config = settings(project, tmp_path, {"n_trials": 9})
    with pytest.raises(UserError, match=r"(?s)5 trials in a row failed.*ZeroDivisionError: nothing works today"):
        search(config)
    assert len(study_of(config).trials) == 5


def test_pruning_looks_at_every_epoch(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[int, float]] = []

    def only_the_second(_: Any, study: Any, trial: Any) -> bool:
        asked.append(dict(trial.intermediate_values))
        return trial.number == 1

    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", only_the_second)
    config = settings(project, tmp_path)
    search(config)
    trials = study_of(config).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert [list(curve) for curve in asked] == [[1], [1, 2], [1], [1], [1, 2]]
    assert trials[1].user_attrs["reason"].startswith("pruned after epoch 1, with ")


def test_a_search_that_is_stopped_goes_on_and_tries_that_point_again(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    search(settings(project, undisturbed))
    real, calls = contrastive.contrastive_loss, list[int]()

    def stopped(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:  # in the second trial
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(contrastive, "contrastive_loss", stopped)
    config = settings(project, tmp_path)
    with pytest.raises(Interrupted):
        search(config)
    assert "The same command goes on" in capsys.readouterr().out
    search(config)
    trials = study_of(config).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert trials[2].params == trials[1].params
    expected = study_of(settings(project, undisturbed)).trials
    assert [(t.params, t.value) for t in trials if t.number != 1] == [(t.params, t.value) for t in expected]
    assert [row["tries_again"] for row in rows(config)] == ["", "", "1", ""]


def test_a_study_keeps_to_its_settings(project: Project, tmp_path: Path) -> None:
    search(settings(project, tmp_path, {"n_trials": 1}))
    with pytest.raises(UserError) as error:
        search(settings(project, tmp_path, weight_decay=0.3))
    assert "weight_decay is 0.3 here, and 0.2 in the study" in str(error.value)
    assert "--optuna_cfg.study_name" in str(error.value)
    with pytest.raises(UserError, match=r"optuna_cfg\.objective"):
        search(settings(project, tmp_path, {"objective": "v2t.R@1"}))
    search(settings(project, tmp_path, {"n_trials": 1, "study_name": "another"}, weight_decay=0.3))


def test_a_study_of_another_program_is_left_alone(project: Project, tmp_path: Path) -> None:
    config = settings(project, tmp_path)
    assert config.optuna_cfg is not None
    theirs = optuna.create_study(storage=config.optuna_cfg.storage, study_name="tiny-full")
    theirs.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(UserError, match="was made by another program"):
        search(config)


def test_a_study_keeps_to_its_data_and_weights(project: Project, tmp_path: Path) -> None:
    search(settings(project, tmp_path, {"n_trials": 1}))
    captions = json.loads(Path(project["val_annot"]).read_text())
    captions["video0"]["sentences"] = ["something else"]
    other = tmp_path / "val.json"
    other.write_text(json.dumps(captions))
    with pytest.raises(UserError, match="the validation data is"):
        search(settings(project, tmp_path, val_annot=str(other)))
    shutil.copytree(project["clip_weights"], tmp_path / "clip")
    search(settings(project, tmp_path, {"n_trials": 1}, clip_weights=str(tmp_path / "clip")))
    (tmp_path / "clip" / "more.bin").write_bytes(b"other weights")
    with pytest.raises(UserError, match="the content of clip_weights is"):
        search(settings(project, tmp_path, clip_weights=str(tmp_path / "clip")))


def test_searches_of_one_second_have_folders_of_their_own(project: Project, tmp_path: Path) -> None:
    storages = [f"sqlite:///{tmp_path}/{name}.db" for name in "ab"]
    folders = set()
    for storage in storages:
        config = settings(project, tmp_path, {"n_trials": 1, "storage": storage})
        with open_storage(storage) as opened:
            folders.add(open_study(config, search_space(config), opened.storage).user_attrs["folder"])
    assert len(folders) == 2


def test_the_earliest_of_equals_keeps_the_weights(project: Project, tmp_path: Path) -> None:
    """Of two workers the later trial ends first, with the same value."""
    config = settings(project, tmp_path, {"n_trials": 1})
    search(config)
    assert config.optuna_cfg is not None
    study, folder = study_of(config), folder_of(config)
    (folder / "trial-0001").mkdir()
    (folder / "trial-0001" / "best.safetensors").touch()
    study.add_trial(optuna.create_trial(value=study.trials[0].value))
    StudyFolder(config, study).write(study)
    assert best_trial(study).number == 0  # type: ignore[union-attr]
    assert [path.parent.name for path in folder.glob("*/best.safetensors")] == ["trial-0000"]
    value = study.trials[0].value
    assert value is not None
    assert order(study, value, 0) < order(study, value, 1) < order(study, value - 1, 0)


@pytest.mark.parametrize("ending", ["failed", "pruned"])
def test_no_model_is_alive_when_the_next_trial_begins(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    made, alive = list[weakref.ref[VideoRetriever]](), list[int]()
    real = trainer.open_model

    def counted(*arguments: Any, **named: Any) -> Any:
        alive.append(sum(model() is not None for model in made))
        session = real(*arguments, **named)
        made.append(weakref.ref(session.model))
        return session

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer, "open_model", counted)
    if ending == "failed":
        monkeypatch.setattr(contrastive, "contrastive_loss", fails)
    else:
        monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", lambda *_: True)
    search(settings(project, tmp_path))
    assert alive == [0, 0, 0, 0]  # zero-shot's too
    attributes = study_of(settings(project, tmp_path)).trials[-1].user_attrs
    assert attributes["trainable_parameters"] > 0
    assert ending == "failed" or attributes["peak_memory_mib"] > 0


def test_a_trial_that_another_process_ended_is_let_go(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(project, tmp_path, {"n_trials": 2})
    real, calls = contrastive.contrastive_loss, list[int]()

    def declared_dead(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            storage = searched_in[0].storage
            study_id = storage.get_study_id_from_name("tiny-full")
            storage.set_trial_state_values(storage.get_all_trials(study_id)[-1]._trial_id, TrialState.FAIL)
        return real(*arguments)

    searched_in: list[Any] = []
    opening = searching.open_storage

    @contextmanager
    def remembered(url: str) -> Iterator[Any]:
        with opening(url) as storage:
            searched_in.append(storage)
            yield storage

    monkeypatch.setattr(searching, "open_storage", remembered)
    monkeypatch.setattr(contrastive, "contrastive_loss", declared_dead)
    search(config)
    assert "trial 0 was taken for dead and ended by another process" in capsys.readouterr().out
    trials = study_of(config).trials
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert trials[1].params == trials[0].params


def test_a_search_on_the_test_says_so(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(settings(project, tmp_path, {"n_trials": 1}, test_annot=project["val_annot"]))
    out = capsys.readouterr().out
    assert "WARNING: every figure of this search is selected on test" in out
    assert "best: trial 0, t2v.R@1" in out and out.count("selected on test") == 2


def test_what_is_left_out_stands_beside_the_figures(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = json.loads(Path(project["val_annot"]).read_text())
    (tmp_path / "val.json").write_text(json.dumps({**captions, "gone": {"sentences": ["nobody saw it"]}}))
    search(settings(project, tmp_path, {"n_trials": 1}, val_annot=str(tmp_path / "val.json"), skip_missing=True))
    assert ", WITHOUT 1 of 7 videos" in capsys.readouterr().out


def test_ranks_are_minimised(project: Project, tmp_path: Path) -> None:
    config = settings(project, tmp_path, {"objective": "t2v.MeanR"})
    search(config)
    study = study_of(config)
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    best = study.best_trial
    metrics = json.loads((folder_of(config) / f"trial-{best.number:04d}" / "metrics.json").read_text())
    assert metrics["best_validation"]["t2v"]["MeanR"] == best.value == min(trial.value for trial in study.trials)


def test_the_best_values_are_trained_with_and_tested_once(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(project, tmp_path, do_training_af_optuna=True)
    search(config)
    study = study_of(config)
    trained = study.user_attrs["trained_with_the_best"]
    run = Path(trained["folder"])
    about = json.loads((run / "study.json").read_text())
    assert about == {"study": "tiny-full", "folder": str(folder_of(config)), "trial": study.best_trial.number}
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["evaluated_on"] == "test" and metrics["finetuned"] == trained["test"]
    assert metrics["zero_shot"] is not None
    assert load_config(run / "config.json").learning_rate == study.best_params["learning_rate"]
    capsys.readouterr()
    search(config)
    assert f"already: {run}" in capsys.readouterr().out


def test_the_training_with_the_best_values_goes_on_where_it_was_stopped(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(project, tmp_path, {"n_trials": 1}, do_training_af_optuna=True)
    real, calls = contrastive.contrastive_loss, list[int]()

    def stopped(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:  # six updates are the trial's
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(contrastive, "contrastive_loss", stopped)
    with pytest.raises(Interrupted):
        search(config)
    trained = study_of(config).user_attrs["trained_with_the_best"]
    assert json.loads((Path(trained["folder"]) / "study.json").read_text())["trial"] == 0
    search(config)
    assert study_of(config).user_attrs["trained_with_the_best"].keys() == {"trial", "folder", "test"}
    assert len([path for path in (tmp_path / "out" / "tiny").iterdir() if path.name.endswith("-full")]) == 2
    assert len(calls) == 12, "no update is made twice"


def test_no_output(project: Project, tmp_path: Path) -> None:
    config = settings(project, tmp_path, no_output=True)
    search(config)
    assert [trial.state for trial in study_of(config).trials] == [TrialState.COMPLETE] * 3
    assert not (tmp_path / "out").exists()


def test_a_search_is_one_process_a_trial(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "h", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="start the command several times on one study"):
        search(settings(project, tmp_path))
