"""Runs, evaluations and checks of `task: classification`, on a dozen videos of four colours."""

import json
import shutil
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import killed
import numpy as np
import optuna
import pytest
import torch
from comparing import evaluated, trained_run
from evaluating import report_of, together

from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.errors import NotFinite, UserError
from adaclip_finetune.evaluation.bootstrap import intervals
from adaclip_finetune.evaluation.tasks.classification import Classification
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.training.evaluate_only import evaluate_only
from adaclip_finetune.training.measure import read_split
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.trainer import fit
from adaclip_finetune.weights.clip_weights import load_clip

Project = dict[str, Any]
TEMPLATES = {"method": "classification", "config": {"templates": "kinetics", "train_templates": True}}
NAMES = ("top1", "top5", "mean_class")


@pytest.fixture(scope="module")
def colours(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The settings of `project`, with the colour of each video as its class."""
    folder, settings = tmp_path_factory.mktemp("colours"), {**project, "task": TEMPLATES, "val_batch_size": 3}
    for split in ("train_annot", "val_annot", "test_annot"):
        entries = json.loads(Path(project[split]).read_text())
        for entry in entries.values():
            entry["sentences"] = [entry["sentences"][1].removeprefix("it is ")]
        path = folder / Path(project[split]).name
        path.write_text(json.dumps(entries))
        settings[split] = str(path)
    return settings


@pytest.fixture(scope="module")
def run(colours: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classified")
    (folder / "settings.json").write_text(json.dumps({**colours, "output_dir": str(folder / "out"), "num_epochs": 3}))
    assert main(["train", "--config", str(folder / "settings.json")]) == 0
    (found,) = (folder / "out/tiny").iterdir()
    return found


def noted(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return content


def test_a_run_chooses_its_epoch_by_top1_and_writes_figures_by_class(run: Path) -> None:
    found = noted(run)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    by_epoch = [line["metrics"]["top1"] for line in lines if line["event"] == "validation"]
    assert found["best_validation"]["top1"] == max(by_epoch) and found["best_epoch"] == 1 + by_epoch.index(
        max(by_epoch)
    )
    for row in (found["zero_shot"], found["finetuned"]):
        assert (row["classes"], row["videos_evaluated"], row["top5"]) == (4, 8, 100)
    rows = found["finetuned"]["per_class"]
    assert [row["class"] for row in rows] == ["blue", "green", "grey", "red"]
    assert sum(row["videos"] * row["top1"] for row in rows) / 8 == pytest.approx(found["finetuned"]["top1"])
    assert np.mean([row["top1"] for row in rows]) == pytest.approx(found["finetuned"]["mean_class"])
    assert (run / "confusion.png").stat().st_size > 1000 and (run / "frame_usage.png").exists()
    assert "4 classes, templates kinetics (28)" in (run / "train.log").read_text()


def test_a_run_that_was_killed_goes_on_to_the_same_figures(colours: Project, run: Path, tmp_path: Path) -> None:
    """Each epoch draws other templates; the third one is interrupted, and update 6 was saved."""
    settings = {**colours, "output_dir": str(tmp_path), "num_epochs": 3}
    assert killed.run(settings, tmp_path / "log", "update", 8) == -signal.SIGKILL
    (stopped,) = (tmp_path / "tiny").iterdir()
    fit(continued_config(load_config(None, {"resume": str(stopped)})), folder=stopped)
    assert noted(stopped) == noted(run)


def test_evaluate_has_intervals_differences_and_the_figures_of_the_run(
    colours: Project, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = evaluated(run, "--annot", colours["test_annot"], "--markdown", tmp_path / "found.md", folder=tmp_path)
    baseline, model = table["rows"]
    for row, own in ((baseline, noted(run)["zero_shot"]), (model, noted(run)["finetuned"])):
        assert [row[name] for name in NAMES] == [own[name] for name in NAMES]
        assert row["top1 95%"][0] <= row["top1"] <= row["top1 95%"][1]
        assert row["top5 95%"] == list(intervals(np.ones(8))["R@5"])
    assert model["per_class"] == noted(run)["finetuned"]["per_class"]
    (difference,) = table["differences_in_R@1"]
    assert difference["top1"]["points"] == pytest.approx(model["top1"] - baseline["top1"])
    printed = capsys.readouterr().out
    assert "top1" in printed and "95 %" in printed and f"top1 of {run.name} minus zero-shot" in printed
    assert "8 of these 8 videos" in printed and "captions" not in printed  # all classes are in the training data, too
    assert "| top1 | 95 % | top5 | mean_class |" in (tmp_path / "found.md").read_text()


def test_a_run_of_another_task_classifies_when_asked(project: Project, colours: Project, tmp_path: Path) -> None:
    run = trained_run(project, tmp_path / "work", num_epochs=1, frame_agg="qscore", primary="v2t.R@5")
    task = ["--task.method", "classification", "--task.config.templates", "action", "--task.config.normalize"]
    (_, row) = evaluated(run, "--annot", colours["test_annot"], *task, folder=tmp_path)["rows"]
    assert row["classes"] == 4 and row["top5"] == 100
    mixes = ["--interpolate", "0,1"]
    (_, model, _, end) = evaluated(run, "--annot", colours["test_annot"], *task, *mixes, folder=tmp_path)["rows"]
    assert end["top1"] == model["top1"] == row["top1"]


def as_json(config: Any, keep: Path | None = None) -> dict[str, Any]:
    found = report_of(config, keep)
    return {**found.as_dict(), "answers": found.answers.tolist(), "ranks": found.ranks.tolist()}


def test_processes_batches_and_kept_parts_change_nothing(colours: Project, tmp_path: Path) -> None:
    config = load_config(None, colours)
    expected = as_json(config)
    assert together(2, as_json, config, folder=tmp_path / "two") == [expected] * 2
    assert as_json(config, tmp_path / "keep") == as_json(config, tmp_path / "keep") == expected
    assert len(list((tmp_path / "keep").glob("texts-*"))) == -(-4 * 28 // 3)


def test_a_diverged_model_is_told_so(colours: Project) -> None:
    config = load_config(None, colours)
    loaded = load_clip(config)
    model = VideoRetriever(config, loaded)
    torch.nn.init.constant_(loaded.module.text_projection, float("nan"))
    split = evaluation_split(config, colours["test_annot"])
    task = Classification(config, split, loaded, model.views(), "test")
    with closing(task), pytest.raises(NotFinite, match=r"test: .*diverged"):
        task(model)


def test_classes_of_a_file_may_have_no_video_and_skipped_videos_keep_their_class(
    colours: Project, tmp_path: Path
) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("violet\nred\ngreen\nblue\ngrey\n")
    more = {**colours, "task": {"method": "classification", "config": {"classes": str(classes)}}}
    found = as_json(load_config(None, more))
    assert found["classes"] == 5 and [row["class"] for row in found["per_class"]] == ["red", "green", "blue", "grey"]

    frames = tmp_path / "frames"
    shutil.copytree(colours["frames_dir"], frames)
    for name in ("video4", "video8"):  # the red ones
        shutil.rmtree(frames / name)
    lenient = {**colours, "frames_dir": str(frames), "skip_missing": True}
    found = as_json(load_config(None, lenient))
    assert (found["classes"], found["videos_evaluated"], found["videos_listed"]) == (4, 6, 8)
    assert [row["class"] for row in found["per_class"]] == ["blue", "green", "grey"]


def test_a_split_that_cannot_be_classified_is_refused_and_check_says_so(
    project: Project, colours: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = {**colours, "test_annot": project["test_annot"]}
    config = load_config(None, captions)
    with pytest.raises(UserError, match=r"video4.*several classes"):
        read_split(config, config.test_annot, RunFolder(config), "test")
    for name, settings, code in (("wrong", captions, 1), ("right", colours, 0)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**settings, "output_dir": str(tmp_path / "out")}))
        capsys.readouterr()
        assert main(["check", "--config", str(path), "--json"]) == code
        findings = json.loads(capsys.readouterr().out)["findings"]
        of_test = [one for one in findings if one["check"] == "classes" and one["split"] == "test"]
        assert [one["severity"] for one in of_test] == ["fine" if name == "right" else "fails"]
        assert not any(one["check"] in ("shared_captions", "captions_of_both") for one in findings)
    missing = {**colours, "task": {"method": "classification", "config": {"classes": "none.txt"}}}
    path.write_text(json.dumps(missing))
    assert main(["train", "--config", str(path)]) == 2
    assert "task.config.classes none.txt: file not found" in capsys.readouterr().err


def test_clip_itself_is_measured(colours: Project, tmp_path: Path) -> None:
    config = load_config(None, {**colours, "do_inference": True, "output_dir": str(tmp_path)})
    report = evaluate_only(config)
    (folder,) = (tmp_path / "tiny").iterdir()
    assert noted(folder)["zero-shot"] == report.as_dict() and (folder / "confusion.png").exists()


def test_tuning_optimises_top1(colours: Project, tmp_path: Path) -> None:
    study = {
        "n_trials": 1, "storage": f"sqlite:///{tmp_path}/o.db", "opt_params": {"learning_rate": {"range": [1e-4, 1e-3]}}
    }  # fmt: skip
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({**colours, "output_dir": str(tmp_path / "out"), "num_epochs": 1, "optuna_cfg": study}))
    assert main(["train", "--config", str(path)]) == 0
    (trial,) = (tmp_path / "out").rglob("metrics.jsonl")
    lines = map(json.loads, trial.read_text().splitlines())
    (validated,) = [line["metrics"]["top1"] for line in lines if line["event"] == "validation"]
    (storage,) = optuna.get_all_study_summaries(study["storage"])
    assert storage.best_trial is not None and storage.best_trial.value == validated
