"""Whole runs on a dozen tiny videos: what they find, print, write and refuse."""

import csv
import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.data.loader import epoch_batches
from adaclip_finetune.data.readable import UnreadableVideos
from adaclip_finetune.errors import UserError
from adaclip_finetune.objectives import contrastive
from adaclip_finetune.training import outcome, trainer
from adaclip_finetune.training.dry_run import dry_run
from adaclip_finetune.training.evaluate_only import evaluate_only
from adaclip_finetune.training.optimizer import BertAdam, schedule
from adaclip_finetune.training.outcome import FitResult
from adaclip_finetune.training.signals import Interrupted
from adaclip_finetune.training.trainer import Trainer, fit
from adaclip_finetune.weights.loaded import LOGIT_BIAS

Project = dict[str, Any]
BITFIT = {"method": "bitfit", "config": {"keep_module_keywords": ["ln_post", "logit_scale"]}}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is a third of such a run's time; test_report.py draws."""
    monkeypatch.setattr(trainer, "draw_curves", lambda path, *_: path.write_bytes(b"a picture"))
    monkeypatch.setattr(outcome, "draw_frame_usage", lambda path, *_: path.write_bytes(b"a picture"))


def run(project: Project, tmp_path: Path, **settings: Any) -> FitResult:
    return fit(load_config(None, {**project, "output_dir": str(tmp_path), **settings}))


def events(folder: Path | None, kind: str) -> list[dict[str, Any]]:
    assert folder is not None
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def clip_changes(folder: Path | None, project: Project) -> set[str]:
    """Names of CLIP's tensors in best.safetensors that are not bit for bit the pretrained ones."""
    assert folder is not None
    pretrained = load_file(Path(project["clip_weights"]) / "open_clip_model.safetensors")
    best = load_file(folder / "best.safetensors")
    return {name for name, tensor in pretrained.items() if not torch.equal(best[f"clip.{name}"], tensor)}


def test_a_run_leaves_everything_behind(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(project, tmp_path, peft=BITFIT)
    folder = result.folder
    assert folder is not None
    assert folder.parent == tmp_path / "tiny"
    assert folder.name.endswith("-bitfit")
    assert {path.name for path in folder.iterdir() if path.stat().st_size} == {
        *("config.json", "train.log", "metrics.jsonl", "metrics.json", "environment.json", "tensorboard"),
        *("best.safetensors", "adapter.safetensors", "curves.png", "frame_usage.png"),
    }
    assert list((folder / "tensorboard").iterdir())
    assert load_config(folder / "config.json").peft.method == "bitfit"
    printed = capsys.readouterr().out
    assert printed.index("zero-shot on test") < printed.index("epoch 1/2") < printed.index("finetuned")
    assert "run folder" in printed
    assert printed in (folder / "train.log").read_text() + "\n"

    updates = events(folder, "train")
    assert [event["step"] for event in updates] == [1, 2, 3, 4, 5, 6]
    for event in updates:
        assert {"loss", "lr", "tau", "k", "videos_per_second", "memory_mib"} <= event.keys()
        assert event["lr"].keys() == {"clip_decay", "clip_no_decay", "other_decay", "other_no_decay"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["selected_on"] == "validation"
    assert metrics["finetuned"]["t2v"]["videos_evaluated"] == metrics["finetuned"]["v2t"]["videos_listed"] == 8
    assert metrics["zero_shot"]["t2v"]["R@1"] == result.zero_shot.metrics.t2v.recall(1)


def test_without_a_selector_no_temperature_is_logged(project: Project, tmp_path: Path) -> None:
    result = run(project, tmp_path, num_epochs=1, use_policy=False)
    assert all("tau" not in event and event["k"] == 6 for event in events(result.folder, "train"))


def test_a_bias_that_the_loss_created_is_part_of_the_result(project: Project, tmp_path: Path) -> None:
    """`objective: sigmoid` on a CLIP without a logit_bias: it learns whatever the method freezes, and is kept."""
    result = run(project, tmp_path, peft=BITFIT, objective={"method": "sigmoid"})
    assert result.folder is not None
    best, adapter = (load_file(result.folder / f"{name}.safetensors") for name in ("best", "adapter"))
    assert torch.equal(best["clip.logit_bias"], adapter["clip.logit_bias"])
    assert best["clip.logit_bias"].item() != LOGIT_BIAS
    for name in ("best", "adapter"):
        path = str(result.folder / f"{name}.safetensors")
        for objective in ({"method": "sigmoid"}, None):
            given = {**project, "do_inference": True, "no_output": True, "resume": path, "objective": objective}
            assert evaluate_only(load_config(None, given)).as_dict() == result.final.as_dict()


def test_the_best_epoch_is_chosen_on_validation_and_evaluated_once(project: Project, tmp_path: Path) -> None:
    result = run(project, tmp_path, num_epochs=4)
    scores = [event["metrics"]["t2v"]["R@1"] for event in events(result.folder, "validation")]
    assert len(scores) == 4
    assert result.best_epoch == 1 + scores.index(max(scores)), "ties go to the earlier epoch"
    assert result.best_validation.metrics.t2v.recall(1) == max(scores)
    assert result.final.num_listed == 8 and not result.selected_on_test


def test_without_a_test_the_figures_say_what_chose_the_epoch(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(project, tmp_path, test_annot=None, num_epochs=1)
    assert result.evaluated_on == "validation"
    assert "these captions chose the epoch" in capsys.readouterr().out


def test_fault_best_epoch_picked_on_test_unsaid(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "another name.json"
    copy.write_text(Path(project["val_annot"]).read_text())
    for test_annot in (project["val_annot"], str(copy)):
        result = run(project, tmp_path, test_annot=test_annot, num_epochs=1)
        assert result.selected_on_test
        assert result.folder is not None
        assert json.loads((result.folder / "metrics.json").read_text())["selected_on"] == "test"
        assert capsys.readouterr().out.lower().count("selected on test") == 2


@pytest.mark.parametrize(("settings", "changing"), [
    ({"peft": {"method": "full"}, "freeze_layer_num": -1}, 0.9),
    ({"peft": BITFIT}, 0.1),
    ({"freeze_clip": True}, 0.0),
])  # fmt: skip
def test_only_what_should_learn_changes(
    settings: dict[str, Any], changing: float, project: Project, tmp_path: Path
) -> None:
    result = run(project, tmp_path, num_epochs=1, **settings)
    changed = clip_changes(result.folder, project)
    assert (len(changed) >= changing * 50) if changing else not changed
    if settings.get("peft") == BITFIT:
        assert all(n.endswith(".bias") or "ln_post" in n or n == "logit_scale" for n in changed)


def test_adapter_holds_only_what_differs_from_clip(project: Project, tmp_path: Path) -> None:
    result = run(project, tmp_path, peft=BITFIT)
    assert result.folder is not None
    adapter = load_file(result.folder / "adapter.safetensors")
    best = load_file(result.folder / "best.safetensors")
    in_clip = {name.removeprefix("clip.") for name in adapter if name.startswith("clip.")}
    assert clip_changes(result.folder, project) <= in_clip
    assert all(name.endswith(".bias") or "ln_post" in name or name == "logit_scale" for name in in_clip)
    assert {name for name in best if not name.startswith("clip.")} <= adapter.keys()


def test_ibs_differs_from_clip_only_where_it_should(project: Project, tmp_path: Path) -> None:
    settings = {"num_pre_epochs": 1, "pre_batch_size": 6, "retain_ratio": 0.2, "keep_module_keywords": ["ln_post"]}
    result = run(project, tmp_path, num_epochs=3, peft={"method": "ibs", "config": settings})
    assert result.folder is not None
    with (result.folder / "ibs_parameters.csv").open() as file:
        rows = list(csv.DictReader(file))
    retained = {row["name"] for row in rows if row["retained"] == "True"}
    assert 0 < len(retained) < len(rows)
    changed = clip_changes(result.folder, project)
    assert changed <= retained | {"visual.ln_post.weight", "visual.ln_post.bias"}
    assert changed & retained
    assert (result.folder / "ibs_parameters.png").stat().st_size > 0
    # An epoch in which everything learned is never the result, whatever its score.
    assert result.best_epoch > 1
    epochs = [event["epoch"] for event in events(result.folder, "train")]
    assert epochs.count(1) == 2 and epochs.count(2) == 3, "pre_batch_size 6, then batch_size 4, of 12 videos"
    rates = [event["lr"]["other_decay"] for event in events(result.folder, "train")]
    assert rates[0] == rates[2] == 0, "a new schedule begins with the second phase"


def test_learning_rate_follows_the_schedule_over_real_updates(project: Project, tmp_path: Path) -> None:
    """Faults of the published system: the scheduler stepped before the optimizer, and the rate logged blank."""
    result = run(project, tmp_path, num_epochs=3, batch_size=5, gradient_accumulation_steps=2)
    updates = events(result.folder, "train")
    assert len(updates) == 3 * math.ceil(math.ceil(12 / 5) / 2)
    for done, event in enumerate(updates):
        share = schedule(done / len(updates), 0.1, False)
        assert event["lr"]["other_decay"] == pytest.approx(1e-3 * share)
        assert event["lr"]["clip_decay"] == pytest.approx(1e-4 * share)


def test_accumulation_of_an_uneven_last_batch_weighs_each_pair_alike(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 videos in batches of 3: the window's gradient is the mean over pairs, not over batches."""
    shares: list[tuple[float, int]] = []
    original = contrastive.contrastive_loss

    def spy(logits: torch.Tensor, videos: torch.Tensor) -> torch.Tensor:
        loss = original(logits, videos)
        loss.register_hook(lambda gradient: shares.append((float(gradient), len(logits))))
        return loss

    monkeypatch.setattr(contrastive, "contrastive_loss", spy)
    run(project, tmp_path, data_subset=8, batch_size=3, gradient_accumulation_steps=3, num_epochs=1)
    assert [size for _, size in shares] == [3, 3, 2]
    assert [share for share, _ in shares] == pytest.approx([3 / 8, 3 / 8, 2 / 8])


def test_a_diverged_loss_stops_the_run_and_keeps_what_was_good(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = contrastive.contrastive_loss, []

    def diverges(logits: torch.Tensor, videos: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        loss = original(logits, videos)
        return loss * float("nan") if len(calls) == 5 else loss

    monkeypatch.setattr(contrastive, "contrastive_loss", diverges)
    with pytest.raises(UserError, match=r"nan at update 5, on the videos video\d+") as error:
        run(project, tmp_path)
    assert "learning_rate" in str(error.value) and "untouched" in str(error.value)
    (folder,) = (tmp_path / "tiny").iterdir()
    best = load_file(folder / "best.safetensors")
    assert all(tensor.isfinite().all() for tensor in best.values())


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """As in a terminal: where the tests run in the background, the shell has SIGINT ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_finishes_the_update_saves_and_says_how_to_go_on(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, calls = trainer.clamp_logit_scale, []

    def press_ctrl_c(clip: torch.nn.Module) -> None:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        original(clip)

    monkeypatch.setattr(trainer, "clamp_logit_scale", press_ctrl_c)
    with pytest.raises(Interrupted):
        run(project, tmp_path)
    assert len(calls) == 2
    (folder,) = (tmp_path / "tiny").iterdir()
    printed = capsys.readouterr().out
    assert f"--resume {folder}" in printed
    assert len(events(folder, "train")) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # And the way that it names works.
    monkeypatch.setattr(trainer, "clamp_logit_scale", original)
    assert main(["train", "--resume", str(folder)]) == 0
    assert [event["step"] for event in events(folder, "train")] == [1, 2, 3, 4, 5, 6]


def test_resumed_weights_are_where_training_starts(project: Project, tmp_path: Path) -> None:
    first = run(project, tmp_path)
    assert first.folder is not None
    best = str(first.folder / "best.safetensors")
    result = evaluate_only(load_config(None, {**project, "do_inference": True, "resume": best, "no_output": True}))
    assert result.metrics.as_dict() == first.final.metrics.as_dict()
    still = run(project, tmp_path, resume=best, num_epochs=1, learning_rate=1e-30, weight_decay=0)
    assert still.final.metrics.as_dict() == first.final.metrics.as_dict()
    # The baseline is CLIP as it was, not what was resumed.
    assert still.zero_shot.metrics.as_dict() == first.zero_shot.metrics.as_dict()
    assert still.folder is not None
    assert not (still.folder / "adapter.safetensors").exists()


def test_inference_needs_no_training_annotation_and_saves_the_similarity(project: Project, tmp_path: Path) -> None:
    matrix = tmp_path / "deep" / "s.npy"
    settings = {k: v for k, v in project.items() if k not in ("train_annot", "val_annot")}
    config = load_config(
        None,
        {**settings, "do_inference": True, "output_dir": str(tmp_path), "save_similarity": str(matrix)}
        | {"concat_captions": "indep-all"},
    )
    result = evaluate_only(config)
    similarity = np.load(matrix)
    ids = json.loads(matrix.with_suffix(".json").read_text())
    assert similarity.shape == (16, 8) == (len(ids["queries"]), len(ids["videos"]))
    own = similarity[np.arange(16), ids["video_of_query"]]
    ranks = 1 + (similarity > own[:, None]).sum(1) + ((similarity == own[:, None]).sum(1) - 1)
    np.testing.assert_array_equal(ranks, result.metrics.t2v.ranks)
    (folder,) = (tmp_path / "tiny").iterdir()
    assert json.loads((folder / "metrics.json").read_text()).keys() == {"zero-shot"}


def test_no_output_writes_nothing(project: Project, tmp_path: Path) -> None:
    result = run(project, tmp_path, no_output=True)
    assert result.folder is None
    assert list(tmp_path.iterdir()) == []


def test_runs_are_repeatable_and_independent_of_workers(project: Project, tmp_path: Path) -> None:
    settings = {"sampling": "random", "concat_captions": "indep-one", "num_epochs": 1, "no_output": True}
    losses = []
    for workers in (0, 2):
        result = run(project, tmp_path, **{**settings, "no_output": False}, num_workers=workers)
        losses.append([event["loss"] for event in events(result.folder, "train")])
    assert losses[0] == losses[1]


def test_two_fits_in_one_process_may_differ_in_precision(project: Project, tmp_path: Path) -> None:
    assert run(project, tmp_path, precision="bf16", num_epochs=1).best_epoch == 1
    assert run(project, tmp_path, precision="fp32", num_epochs=1).best_epoch == 1
    assert not torch.distributed.is_initialized(), "a fault: a process group needed for one process"
    assert not torch.is_anomaly_enabled(), "a fault: anomaly detection left on"


def test_training_ends_when_nothing_of_a_batch_can_be_read_any_more(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = tmp_path / "frames"
    shutil.copytree(project["frames_dir"], frames)

    real = Trainer._validate

    def unplug(*arguments: Any) -> None:
        real(*arguments)
        for path in frames.glob("*/*.jpg"):
            path.write_bytes(b"")

    monkeypatch.setattr(Trainer, "_validate", unplug)
    config = load_config(None, {**project, "output_dir": str(tmp_path), "frames_dir": str(frames)})
    with pytest.raises(UnreadableVideos, match=r"nothing of a training batch could be read(.|\n)*image_0000"):
        fit(config)


def test_gradient_checkpointing_changes_nothing(project: Project, tmp_path: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        result = run(project, tmp_path, num_epochs=1, gradient_checkpointing=checkpointing)
        losses.append([event["loss"] for event in events(result.folder, "train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_fault_a_batch_larger_than_the_data(project: Project, tmp_path: Path) -> None:
    result = run(project, tmp_path, batch_size=500, gradient_accumulation_steps=4, num_epochs=1)
    assert len(events(result.folder, "train")) == 1


def test_a_missing_training_video_is_left_out_by_name(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(Path(project["train_annot"]).read_text())
    train = tmp_path / "train.json"
    train.write_text(json.dumps({**content, "gone": {"sentences": ["nobody saw it"]}}))
    result = run(project, tmp_path / "out", train_annot=str(train), num_epochs=1)
    assert result.folder is not None
    assert (result.folder / "missing_videos.txt").read_text().startswith("gone\t")
    assert "gone" in capsys.readouterr().out


def test_missing_videos_of_an_evaluation_are_counted_beside_every_figure(project: Project, tmp_path: Path) -> None:
    content = json.loads(Path(project["test_annot"]).read_text())
    test = tmp_path / "test.json"
    test.write_text(json.dumps({**content, "gone": {"sentences": ["nobody saw it"]}}))
    with pytest.raises(UserError, match="gone"):
        run(project, tmp_path / "out", test_annot=str(test))
    assert not (tmp_path / "out").exists(), "a refused run leaves no folder"
    result = run(project, tmp_path / "out", test_annot=str(test), skip_missing=True, num_epochs=1)
    assert result.folder is not None
    metrics = json.loads((result.folder / "metrics.json").read_text())
    for model in ("zero_shot", "finetuned"):
        for direction in ("t2v", "v2t"):
            assert metrics[model][direction]["videos_evaluated"] == 8
            assert metrics[model][direction]["videos_listed"] == 9
    assert "8 videos, 1 of 9 MISSING" in (result.folder / "train.log").read_text()


def test_dry_run_counts_and_writes_nothing(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, {**project, "output_dir": str(tmp_path), "peft": BITFIT, "num_epochs": 3})
    dry_run(config, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"parameters", "gflops", "steps"}
    assert found["steps"] == 3 * len(epoch_batches(12, 4, 0, 0))
    assert 0 < found["parameters"]["clip"]["trainable"] < found["parameters"]["clip"]["total"]
    assert found["parameters"]["selector"]["trainable"] == found["parameters"]["selector"]["total"] > 0
    assert list(tmp_path.iterdir()) == []
    real = run(project, tmp_path, peft=BITFIT, num_epochs=3)
    assert real.parameters.as_dict() == found["parameters"]
    assert len(events(real.folder, "train")) == found["steps"]


def test_dry_run_of_the_published_recipe_downloads_nothing(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {k: v for k, v in project.items() if k not in ("clip_weights", "policy_backbone", "rescale_size")}
    keywords = ["ln_post", "visual.proj", "ln_final", "text_projection", "logit_scale"]
    bitfit = {"method": "bitfit", "config": {"keep_module_keywords": keywords}}
    found = dry_run(load_config(None, {**settings, "peft": bitfit}), as_json=True)
    assert found["parameters"]["clip"] == {"trainable": 780_801, "total": 151_277_313}
    assert round(found["gflops"]["clip_frame"], 2) == 4.36


def test_dry_run_of_an_evaluation_asks_for_no_validation(project: Project) -> None:
    config = load_config(None, {**project, "do_inference": True, "val_annot": "not/there.json"})
    assert dry_run(config, as_json=False)["steps"] == 0


def test_a_checkpoint_is_data_with_its_settings(project: Project, tmp_path: Path) -> None:
    result = run(project, tmp_path, num_epochs=1, save_last=True)
    assert result.folder is not None
    for name in ("best.safetensors", "last.safetensors", "adapter.safetensors"):
        with safe_open(result.folder / name, framework="pt") as file:
            metadata = file.metadata()
        assert json.loads(metadata["config"])["num_frm"] == 6
        assert metadata["epoch"] == "1"
    for wrong, message in (
        (result.folder, "is a folder"),
        (Path(project["clip_weights"]) / "open_clip_model.safetensors", "not written by adaclip"),
        (result.folder / "config.json", "cannot be read as safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            run(project, tmp_path, resume=str(wrong))


def test_fault_state_dict_mismatches_are_listed(project: Project, tmp_path: Path) -> None:
    result = run(project, tmp_path, num_epochs=1)
    assert result.folder is not None
    with pytest.raises(UserError) as error:
        run(project, tmp_path, resume=str(result.folder / "best.safetensors"), frame_agg="transformer", hidden_dim=128)
    for part in ("missing: aggregator.transformer", "unexpected: aggregator.scorer.2", "shape: selector.encoder"):
        assert part in str(error.value)


def test_bertadam_is_what_trains_by_default(project: Project) -> None:
    assert load_config(None, project).optim == "bertadam"
    assert issubclass(BertAdam, torch.optim.Optimizer)
