"""Whole runs on a dozen tiny videos: what they find, print, write and refuse."""

import csv
import io
import json
import math
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparing import only_run
from safetensors.torch import load_file

from adaclip_finetune.config import load_config
from adaclip_finetune.data.batches import BatchPlan
from adaclip_finetune.data.readable import UnreadableVideos
from adaclip_finetune.errors import UserError
from adaclip_finetune.objectives import contrastive
from adaclip_finetune.training.evaluate_only import dry_run, evaluate_only
from adaclip_finetune.training.optimizer import bert_schedule
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.trainer import FitResult, Trainer, fit, run_trial

Project = dict[str, Any]
pytestmark = pytest.mark.usefixtures("no_pictures")  # `trained` draws
BITFIT = {"method": "bitfit", "config": {"keep_module_keywords": ["ln_post", "logit_scale"]}}
Trained = tuple[FitResult, Path, str]
DIVERGING = {"learning_rate": 1e20, "coef_lr": 1.0, "no_warmup": True}


def run(project: Project, tmp_path: Path, **settings: Any) -> FitResult:
    return fit(load_config(None, {**project, "output_dir": str(tmp_path), "num_epochs": 1, **settings}))


def events(folder: Path | None, kind: str) -> list[dict[str, Any]]:
    assert folder is not None
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses(result: FitResult) -> list[float]:
    return [event["loss"] for event in events(result.folder, "train")]


def evaluated(project: Project, weights: Path, **settings: Any) -> dict[str, Any]:
    """Return the figures of a weights file, as `--do_inference` finds them."""
    given = {**project, "do_inference": True, "no_output": True, "resume": str(weights), **settings}
    return evaluate_only(load_config(None, given)).as_dict()


def clip_changes(folder: Path | None, project: Project) -> set[str]:
    """Return the names of CLIP's tensors in best.safetensors that are not bit for bit the pretrained ones."""
    assert folder is not None
    pretrained = load_file(Path(project["clip_weights"]) / "open_clip_model.safetensors")
    best = load_file(folder / "best.safetensors")
    return {name for name, tensor in pretrained.items() if not torch.equal(best[f"clip.{name}"], tensor)}


# ---- one finished run, read by several tests ----


@pytest.fixture(scope="module")
def trained(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A BitFit run of three epochs: its result, folder and output."""
    with redirect_stdout(io.StringIO()) as terminal:
        result = run(project, tmp_path_factory.mktemp("trained"), peft=BITFIT, num_epochs=3, save_last=True)
    assert result.folder is not None
    return result, result.folder, terminal.getvalue()


def test_a_run_leaves_everything_behind(trained: Trained, tmp_path: Path) -> None:
    _, folder, printed = trained
    assert folder.parent.name == "tiny" and folder.name.endswith("-bitfit")
    assert {path.name for path in folder.iterdir() if path.stat().st_size} == {
        *("config.json", "train.log", "metrics.jsonl", "metrics.json", "environment.json", "tensorboard"),
        *("best.safetensors", "last.safetensors", "adapter.safetensors", "curves.png", "frame_usage.png"),
    }
    (tmp_path / "mine").touch()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "mine").stat().st_mode}
    assert load_config(folder / "config.json").peft.method == "bitfit"
    assert printed.index("zero-shot on test") < printed.index("finetuned") < printed.index("run folder")
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert log.index("epoch 1/3  validation") < log.index("finetuned")


def test_every_update_is_recorded_with_the_scheduled_learning_rate(trained: Trained) -> None:
    updates = events(trained[1], "train")
    assert [event["step"] for event in updates] == list(range(1, 10))
    for done, event in enumerate(updates):
        assert {"loss", "tau", "k", "videos_per_second", "memory_mib"} <= event.keys()
        share = bert_schedule(done, 9, 0.1)
        rates = {"clip_decay": 1e-4, "clip_no_decay": 1e-4, "other_decay": 1e-3, "other_no_decay": 1e-3}
        assert event["lr"] == pytest.approx({name: rate * share for name, rate in rates.items()})


def test_the_best_epoch_is_chosen_on_validation_and_tested_once(trained: Trained) -> None:
    result, folder, _ = trained
    scores = [event["metrics"]["t2v"]["R@1"] for event in events(folder, "validation")]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == result.metrics
    assert metrics["best_epoch"] == 1 + scores.index(max(scores)), "ties go to the earlier epoch"
    assert metrics["best_validation"]["t2v"]["R@1"] == max(scores)
    assert (metrics["selected_on"], metrics["evaluated_on"]) == ("validation", "test")
    assert metrics["finetuned"]["t2v"]["videos_evaluated"] == metrics["finetuned"]["v2t"]["videos_listed"] == 8
    assert metrics["finetuned"] == events(folder, "finetuned")[0]["metrics"]
    assert metrics["zero_shot"] == events(folder, "zero_shot")[0]["metrics"]
    for name, (low, high) in metrics["intervals"].items():
        direction, figure = name.split(".")
        assert low <= metrics["finetuned"][direction][figure] <= high
    assert {"t2v.R@1", "v2t.MedR"} <= metrics["intervals"].keys()


def test_an_adapter_holds_only_what_differs_from_clip(trained: Trained, project: Project) -> None:
    adapter, best = (load_file(trained[1] / f"{name}.safetensors") for name in ("adapter", "best"))
    in_clip = {name.removeprefix("clip.") for name in adapter if name.startswith("clip.")}
    assert clip_changes(trained[1], project) <= in_clip
    assert all(name.endswith(".bias") or "ln_post" in name or name == "logit_scale" for name in in_clip)
    assert {name for name in best if not name.startswith("clip.")} <= adapter.keys()


def test_what_is_no_fitting_checkpoint_is_refused(trained: Trained, project: Project, tmp_path: Path) -> None:
    folder = trained[1]
    for wrong in (folder, Path(project["clip_weights"]) / "open_clip_model.safetensors", folder / "config.json"):
        with pytest.raises(UserError, match=str(wrong)):
            run(project, tmp_path, resume=str(wrong))
    with pytest.raises(UserError, match=r"hidden_dim|missing: aggregator\.transformer"):
        run(project, tmp_path, resume=str(folder / "best.safetensors"), frame_agg="transformer", hidden_dim=128)
    assert not list(tmp_path.iterdir()), "a refused run leaves no folder"


def test_training_can_start_from_the_weights_of_a_run(trained: Trained, project: Project, tmp_path: Path) -> None:
    result, folder, _ = trained
    best = folder / "best.safetensors"
    assert evaluated(project, best) == result.final.as_dict()
    still = run(project, tmp_path, resume=str(best), learning_rate=1e-30, weight_decay=0)
    assert still.final.as_dict() == result.final.as_dict()
    assert still.metrics["zero_shot"] == result.metrics["zero_shot"], "the baseline is CLIP, not what was resumed"
    assert still.folder is not None and not (still.folder / "adapter.safetensors").exists()


# ---- what learns ----


def test_ibs_differs_from_clip_only_where_it_should(project: Project, tmp_path: Path) -> None:
    settings = {"num_pre_epochs": 1, "pre_batch_size": 6, "retain_ratio": 0.2, "keep_module_keywords": ["ln_post"]}
    result = run(project, tmp_path, num_epochs=3, peft={"method": "ibs", "config": settings})
    assert result.folder is not None
    with (result.folder / "ibs_parameters.csv").open() as file:
        rows = list(csv.DictReader(file))
    retained = {row["name"] for row in rows if row["retained"] == "True"}
    assert 0 < len(retained) < len(rows)
    changed = clip_changes(result.folder, project)
    assert changed <= retained | {"visual.ln_post.weight", "visual.ln_post.bias"} and changed & retained
    assert (result.folder / "ibs_parameters.png").stat().st_size > 0
    assert result.metrics["best_epoch"] > 1, "an epoch in which everything learned is never the result"
    updates = events(result.folder, "train")
    epochs = [event["epoch"] for event in updates]
    assert epochs.count(1) == 2 and epochs.count(2) == 3, "pre_batch_size 6, then batch_size 4, of 12 videos"
    rates = [event["lr"]["other_decay"] for event in updates]
    assert rates[0] == rates[2] == 0, "the second phase has its own schedule"


# ---- updates ----


def test_accumulation_weighs_each_pair_alike(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 videos in batches of 3: the gradient of the window is the mean over pairs, not over batches."""
    shares: list[tuple[float, int]] = []
    original = contrastive.contrastive_loss

    def spy(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        loss = original(logits, *rest)
        loss.register_hook(lambda gradient: shares.append((float(gradient), len(logits))))
        return loss

    monkeypatch.setattr(contrastive, "contrastive_loss", spy)
    result = run(project, tmp_path, data_subset=8, batch_size=3, gradient_accumulation_steps=3)
    assert [size for _, size in shares] == [3, 3, 2] and len(losses(result)) == 1
    assert [share for share, _ in shares] == pytest.approx([3 / 8, 3 / 8, 2 / 8])


@pytest.mark.parametrize(("one", "other", "tolerance"), [
    ({"num_workers": 0}, {"num_workers": 2}, 0),
    ({"gradient_checkpointing": False}, {"gradient_checkpointing": True}, 1e-5),
    ({"batch_size": 12}, {"batch_size": 500, "gradient_accumulation_steps": 4}, 0),
])  # fmt: skip
def test_settings_of_the_machine_change_no_loss(
    one: Project, other: Project, tolerance: float, project: Project, tmp_path: Path
) -> None:
    drawn = {"sampling": "random", "concat_captions": "indep-one"}
    first, second = (losses(run(project, tmp_path, **drawn, **settings)) for settings in (one, other))
    assert first == (pytest.approx(second, rel=tolerance) if tolerance else second)


def test_a_run_may_have_less_precision_and_no_selector(project: Project, tmp_path: Path) -> None:
    single, half = (run(project, tmp_path, precision=p, use_policy=False) for p in ("fp32", "bf16"))
    assert losses(single) != losses(half) and losses(single) == pytest.approx(losses(half), rel=0.1)
    assert all("tau" not in event and event["k"] == 6 for event in events(half.folder, "train"))


# ---- divergence ----


def test_a_diverged_loss_stops_the_run_and_keeps_what_was_good(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = contrastive.contrastive_loss, []

    def diverges(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        loss = original(*arguments)
        return loss * float("nan") if len(calls) == 5 else loss

    monkeypatch.setattr(contrastive, "contrastive_loss", diverges)
    with pytest.raises(UserError, match=r"nan, at update 5, on the videos video\d+.*\n.*learning_rate"):
        run(project, tmp_path, num_epochs=2)
    best = load_file(only_run(tmp_path) / "best.safetensors")
    assert all(tensor.isfinite().all() for tensor in best.values())


@pytest.mark.parametrize(("settings", "where"), [
    ({}, "at update 2"),
    ({"learning_rate": 1e39, "optim": "clip_vip_adamw"}, "at update 2"),
    ({"batch_size": 12, "use_policy": False, "frame_agg": None}, "after update 1"),
])  # fmt: skip
def test_divergence_is_told_alike_wherever_it_shows_first(
    settings: Project, where: str, project: Project, tmp_path: Path
) -> None:
    """In the selector or in the loss, in training or in validation, in a run or in a tuning trial."""
    config = load_config(None, {**project, "output_dir": str(tmp_path), **DIVERGING, **settings})
    for start in (fit, lambda config: run_trial(config, RunFolder(config), lambda epoch, figures: None)):
        with pytest.raises(UserError, match=rf"diverged: .*{where}.*\n.*learning_rate"):
            start(config)


# ---- interruptions and failures ----


def test_no_run_is_lost_with_its_terminal_or_log(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(folder: Path) -> None:
        (folder / "train.log").unlink()
        (folder / "train.log").mkdir()

    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    result = fit(load_config(None, {**project, "output_dir": str(tmp_path)}), opened=full_disk)
    assert result.folder is not None and (result.folder / "metrics.json").exists()


def test_training_ends_if_nothing_of_a_batch_can_be_read_any_more(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = tmp_path / "frames"
    shutil.copytree(project["frames_dir"], frames)

    def unplug(_: Trainer) -> None:
        for path in frames.glob("*/*.jpg"):
            path.write_bytes(b"")

    monkeypatch.setattr(Trainer, "keep_best", unplug)
    with pytest.raises(UnreadableVideos, match=r"nothing of a training batch could be read(.|\n)*image_0000"):
        run(project, tmp_path, frames_dir=str(frames), num_epochs=2)


def test_missing_videos_are_named_and_counted_beside_every_figure(project: Project, tmp_path: Path) -> None:
    given = dict(project)
    for split in ("train_annot", "test_annot"):
        content = json.loads(Path(project[split]).read_text())
        given[split] = str(tmp_path / f"{split}.json")
        Path(given[split]).write_text(json.dumps({**content, f"gone_{split}": {"sentences": ["nobody saw it"]}}))
    with pytest.raises(UserError, match="gone_test_annot"):
        run(given, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "a refused run leaves no folder"
    folder = run(given, tmp_path / "out", skip_missing=True).folder
    assert folder is not None
    assert {line.split("\t")[0] for line in (folder / "missing_videos.txt").read_text().splitlines()} == {
        "gone_train_annot", "gone_test_annot",
    }  # fmt: skip
    metrics = json.loads((folder / "metrics.json").read_text())
    for model in ("zero_shot", "finetuned"):
        for direction in ("t2v", "v2t"):
            found = metrics[model][direction]
            assert (found["videos_evaluated"], found["videos_listed"]) == (8, 9)
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert "gone_train_annot" in log and "1 of 9 MISSING" in log


# ---- what the figures are of ----


@pytest.mark.parametrize(("test", "told"), [("none", "these captions chose"), ("val", "on test"), ("copy", "on test")])
def test_figures_of_captions_that_chose_the_epoch_say_so(
    test: str, told: str, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "another name.json"
    copy.write_text(Path(project["val_annot"]).read_text())
    result = run(project, tmp_path, test_annot={"none": None, "val": project["val_annot"], "copy": str(copy)}[test])
    split = "validation" if test == "none" else "test"
    assert (result.evaluated_on, result.metrics["selected_on"]) == (split, split)
    assert told in capsys.readouterr().out.lower().split("best epoch", 1)[1]


def test_inference_needs_no_training_annotation_and_saves_the_similarity(project: Project, tmp_path: Path) -> None:
    matrix = tmp_path / "deep" / "s.npy"
    settings = {name: value for name, value in project.items() if name not in ("train_annot", "val_annot")}
    settings |= {"do_inference": True, "output_dir": str(tmp_path), "concat_captions": "indep-all"}
    result = evaluate_only(load_config(None, {**settings, "save_similarity": str(matrix)}))
    similarity, ids = np.load(matrix), json.loads(matrix.with_suffix(".json").read_text())
    assert similarity.shape == (16, 8) == (len(ids["queries"]), len(ids["videos"]))
    own = similarity[np.arange(16), ids["video_of_query"]]
    ranks = (similarity >= own[:, None]).sum(1)
    assert result.as_dict()["t2v"]["MeanR"] == pytest.approx(ranks.mean())
    assert json.loads((only_run(tmp_path) / "metrics.json").read_text()).keys() == {"zero-shot"}


def test_no_output_writes_nothing(project: Project, tmp_path: Path) -> None:
    assert run(project, tmp_path, no_output=True).folder is None
    assert not list(tmp_path.iterdir())


# ---- dry runs ----


def test_a_dry_run_counts_and_writes_nothing(
    trained: Trained, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, {**project, "output_dir": str(tmp_path), "peft": BITFIT, "num_epochs": 3})
    dry_run(config, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"parameters", "gflops", "steps"}
    assert found["steps"] == 3 * BatchPlan((12,), 0).num_batches(4) == len(events(trained[1], "train"))
    assert found["parameters"] == trained[0].metrics["parameters"]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_the_published_recipe_downloads_nothing(project: Project) -> None:
    settings = {k: v for k, v in project.items() if k not in ("clip_weights", "policy_backbone", "rescale_size")}
    keywords = ["ln_post", "visual.proj", "ln_final", "text_projection", "logit_scale"]
    bitfit = {"method": "bitfit", "config": {"keep_module_keywords": keywords}}
    found = dry_run(load_config(None, {**settings, "peft": bitfit}), as_json=True)
    assert found["parameters"]["clip"] == {"trainable": 780_801, "total": 151_277_313}
    assert math.isclose(found["gflops"]["clip_frame"], 4.36, abs_tol=0.005)
    evaluation = load_config(None, {**project, "do_inference": True, "val_annot": "not/there.json"})
    assert dry_run(evaluation, as_json=False)["steps"] == 0
