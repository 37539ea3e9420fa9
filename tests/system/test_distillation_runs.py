"""Whole runs with a teacher and a fifth of the videos labelled: resumed, evaluated, and taught by another run."""

import json
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from checking import checked, finding, kinds
from safetensors.torch import load_file

from adaclip_finetune import report
from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.session import open_model
from adaclip_finetune.training.trainer import fit

Project = dict[str, Any]


@pytest.fixture
def given(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Return settings with two labelled videos of ten, each batch one of them and three others, and prompts."""
    for name in ("draw_curves", "draw_frame_usage"):
        monkeypatch.setattr(report, name, lambda path, *_: path.write_bytes(b"a picture"))
    listed = json.loads(Path(project["train_annot"]).read_text())
    names = list(listed)
    for part, chosen in (("labelled", names[:2]), ("others", names[2:10])):
        (tmp_path / f"{part}.json").write_text(json.dumps({name: listed[name] for name in chosen}))
    parts = [
        {"annotation": str(tmp_path / "labelled.json"), "per_batch": 1},
        {"annotation": str(tmp_path / "others.json"), "per_batch": 3, "labelled": False},
    ]
    distilled = {"method": "distillation", "config": {"fit_temperature": True, "temperature": 0.05}}
    drawn = {"sampling": "segments", "augmentation": "crop_flip", "concat_captions": "indep-one"}
    return {**project, **drawn, "train_annot": parts, "objective": distilled, "output_dir": str(tmp_path / "out")}


@pytest.mark.parametrize("more", [
    {"grad_cache_chunk": 2},
    {"tower": {"method": "proxy_tokens", "config": {"temporal_size": 2}}, "peft": {"method": "lora"}},
], ids=["part by part", "another tower"])  # fmt: skip
def test_a_killed_run_resumes_bit_for_bit(more: Project, given: Project, tmp_path: Path) -> None:
    one, other = killed.whole_and_resumed({**given, **more, "coef_lr": 1.0}, tmp_path)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not any("teacher" in name for name in one)


def test_a_run_is_evaluated_and_teaches_another(given: Project, tmp_path: Path) -> None:
    first = fit(load_config(None, {**given, "num_epochs": 1}))
    assert first.folder is not None
    lines = [json.loads(line) for line in (first.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 for line in lines if line["event"] == "train")
    table = tmp_path / "table.json"
    words = ["--annot", str(given["test_annot"]), "--json", str(table)]
    assert main(["evaluate", str(first.folder), *words]) == 0
    noted = json.loads((first.folder / "metrics.json").read_text())["finetuned"]
    assert json.loads(table.read_text())["rows"][-1]["t2v"]["MeanR"] == noted["t2v"]["MeanR"]
    for source in (first.folder, first.folder / "adapter.safetensors"):
        taught = {"method": "distillation", "config": {"teacher": str(source)}}
        config = load_config(None, {**given, "objective": taught, "frame_agg": None})
        second = open_model(config).objective.second_view(config)
        assert second is not None and second[0].frame_agg == "mlp" and second[1].selector is not None
    assert fit(config).metrics["best_epoch"] in (1, 2)


def test_a_run_that_starts_from_a_checkpoint_is_taught_by_its_clip(given: Project, tmp_path: Path) -> None:
    first = fit(load_config(None, {**given, "coef_lr": 10.0, "num_epochs": 1})).folder
    assert first is not None
    learned = {
        name.removeprefix("clip."): tensor
        for name, tensor in load_file(first / "best.safetensors").items()
        if name.startswith("clip.")
    }
    for name in ("best.safetensors", "adapter.safetensors"):
        objective: Any = open_model(load_config(None, {**given, "resume": str(first / name)})).objective
        state = objective.teacher.retriever.clip.state_dict()
        assert all(torch.equal(state[tensor], value) for tensor, value in learned.items())
        assert not torch.equal(state["visual.proj"], open_model(load_config(None, given)).model.clip.visual.proj)


def test_a_teacher_that_is_not_there_is_named(given: Project, tmp_path: Path) -> None:
    taught = {"method": "distillation", "config": {"teacher": str(tmp_path / "gone")}}
    with pytest.raises(UserError, match=r"objective\.config\.teacher: .*gone"):
        open_model(load_config(None, {**given, "objective": taught}))


def test_the_check_tries_steps_with_the_teacher(
    given: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(given))
    code, found = checked(capsys, "--config", str(tmp_path / "config.json"))
    assert code == 0 and kinds(found, "fails") == set()
    assert finding(found, "time", "run").items["batch_size"] == 4
