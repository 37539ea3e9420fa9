"""Runs with `ema_decay`: the average is what the formula says, what is measured and saved, and what is resumed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from spread import spread

from adaclip_finetune import load_retriever
from adaclip_finetune.config import load_config
from adaclip_finetune.training import checkpoint
from adaclip_finetune.training.checkpoint import ADAPTER, Snapshot
from adaclip_finetune.training.evaluate_only import evaluate_only
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.trainer import fit, run_trial

Project = dict[str, Any]
pytestmark = pytest.mark.usefixtures("no_pictures")
EMA = {"ema_decay": 0.3, "coef_lr": 1.0}
LORA = {"method": "lora", "config": {"rank": 2}}


def test_the_saved_weights_are_the_average_of_the_live_ones(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fp16 scaler is taken to skip the second of three updates, which then does not count."""
    snapshots: list[Snapshot] = []
    skipped: Iterator[bool] = iter([False, True, False])
    whole = checkpoint.save_snapshot
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda _: next(skipped)))

    def record(folder: Path, snapshot: Snapshot) -> None:
        tensors = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
        snapshots.append(Snapshot(snapshot.step, tensors, snapshot.values))
        whole(folder, snapshot)

    monkeypatch.setattr(checkpoint, "save_snapshot", record)
    given = {**project, **EMA, "num_epochs": 1, "save_every_steps": 1, "save_last": True, "output_dir": str(tmp_path)}
    result = fit(load_config(None, given))
    assert result.folder is not None and "ema_decay 0.3" in capsys.readouterr().out
    live = [snapshot.group("model") for snapshot in snapshots]
    averages = [
        {name.removeprefix("retriever."): tensor for name, tensor in snapshot.group("ema").items()}
        for snapshot in snapshots
    ]
    assert len(live) == 3 and all(tensor.equal(averages[0][name]) for name, tensor in averages[1].items())
    for name, average in averages[2].items():  # 0.25 is (1 + 2) / (10 + 2)
        torch.testing.assert_close(average, 0.25 * averages[0][name] + 0.75 * live[2][name])

    saved = load_file(result.folder / "best.safetensors")
    assert saved.keys() == load_file(result.folder / "last.safetensors").keys()
    assert all(tensor.equal(averages[2].get(name, live[2][name])) for name, tensor in saved.items())
    pretrained, moved = load_file(Path(project["clip_weights"]) / "open_clip_model.safetensors"), 0
    for name in (name for name in averages[2] if name.startswith("clip.")):
        start = pretrained[name.removeprefix("clip.")]
        first = start * 2 / 11 + live[0][name] * 9 / 11
        torch.testing.assert_close(saved[name], 0.25 * first + 0.75 * live[2][name])
        moved += not torch.allclose(saved[name], live[2][name])
    assert moved > 10

    again = {**project, "do_inference": True, "no_output": True, "resume": str(result.folder / "best.safetensors")}
    for annotation, figures in (("test_annot", "finetuned"), ("val_annot", "best_validation")):
        found = evaluate_only(load_config(None, {**again, "test_annot": project[annotation]})).as_dict()
        assert {name: found[name] for name in ("t2v", "v2t")} == {
            name: result.metrics[figures][name] for name in ("t2v", "v2t")
        }


def test_a_trial_returns_the_averaged_weights(project: Project, tmp_path: Path) -> None:
    given = {**project, **EMA, "num_epochs": 1, "output_dir": str(tmp_path)}
    quiet = load_config(None, {**given, "no_output": True})
    trial, folder = run_trial(quiet, RunFolder(quiet), lambda *_: None), fit(load_config(None, given)).folder
    assert folder is not None
    saved = load_file(folder / "best.safetensors")
    assert saved.keys() == trial.weights.keys()
    assert all(tensor.equal(trial.weights[name]) for name, tensor in saved.items())


def train(settings: Project) -> None:
    fit(load_config(None, settings))


def test_two_processes_average_what_one_does_also_in_the_adapter(project: Project, tmp_path: Path) -> None:
    given = {**project, **EMA, "peft": LORA}
    assert spread(train, 2, tmp_path / "log", {**given, "output_dir": str(tmp_path / "two")}) == [0, 0]
    train({**given, "output_dir": str(tmp_path / "one")})
    one, two = (next((tmp_path / where / "tiny").iterdir()) for where in ("one", "two"))
    torch.testing.assert_close(
        load_file(one / "best.safetensors"), load_file(two / "best.safetensors"), rtol=1e-4, atol=1e-5
    )
    vectors = [load_retriever(one / name).encode_text(["a red thing"]) for name in ("best.safetensors", ADAPTER)]
    torch.testing.assert_close(*vectors, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"peft": LORA},
        {"peft": {"method": "ibs"}, "num_epochs": 3},
        {"peft": {"method": "lisa", "config": {"sampling_interval": 2, "active_ratio": 0.3}}},
        {"policy_backbone": "mobilenet_v3_large", "policy_weights": "random", "num_frm": 2, "top_k": 1},
    ],
    ids=["lora", "ibs", "lisa", "batch norms"],
)
def test_a_killed_run_resumes_bit_for_bit(settings: Project, project: Project, tmp_path: Path) -> None:
    whole, resumed = killed.whole_and_resumed({**project, **EMA, "save_last": True, **settings}, tmp_path)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_ibs_does_not_retain_is_the_pretrained_weight(project: Project, tmp_path: Path) -> None:
    """The average begins anew with the second phase, so that nothing of the first stays in it."""
    ibs = {"method": "ibs", "config": {"num_pre_epochs": 1, "retain_ratio": 0.2}}
    folder = fit(load_config(None, {**project, **EMA, "peft": ibs, "output_dir": str(tmp_path)})).folder
    assert folder is not None
    saved, learned = load_file(folder / "best.safetensors"), json.loads((folder / "metrics.json").read_text())
    pretrained = load_file(Path(project["clip_weights"]) / "open_clip_model.safetensors")
    changed = [name for name, tensor in pretrained.items() if not torch.equal(tensor, saved[f"clip.{name}"])]
    assert changed and sum(pretrained[name].numel() for name in changed) <= learned["parameters"]["clip"]["trainable"]
