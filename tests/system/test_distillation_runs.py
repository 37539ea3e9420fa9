"""Whole runs with a teacher and a fifth of the videos labelled: resumed, evaluated, and taught by another run."""

import json
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from checking import checked, finding, kinds
from conftest import write_clip_folder
from media import write_video
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


@pytest.mark.parametrize("source", ["", "open_clip_model.safetensors"], ids=["folder", "file"])
def test_a_clip_can_teach(source: str, given: Project, tmp_path: Path) -> None:
    write_clip_folder(tmp_path / "clip", seed=1)
    taught = {"method": "distillation", "config": {"teacher": str(tmp_path / "clip" / source)}}
    given |= {"objective": taught, "num_frm": 5}
    if source:  # a file says less than a folder
        given["tower"] = {"method": "proxy_tokens"}
    opened: Any = open_model(load_config(None, given)).objective
    teacher = opened.teacher
    assert teacher.plain and teacher.config.num_frm == given["top_k"] and teacher.config.tower.method == "per_frame"
    wanted = load_file(tmp_path / "clip" / "open_clip_model.safetensors")["visual.proj"]
    assert torch.equal(teacher.retriever.clip.visual.proj, wanted)
    assert fit(load_config(None, {**given, "num_epochs": 1})).metrics["best_epoch"] == 1


def test_a_teacher_that_is_not_there_is_named(given: Project, tmp_path: Path) -> None:
    taught = {"method": "distillation", "config": {"teacher": str(tmp_path / "gone")}}
    with pytest.raises(UserError, match=r"objective\.config\.teacher: .*gone"):
        open_model(load_config(None, {**given, "objective": taught}))


def test_unlabelled_videos_need_no_annotation(
    given: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        write_video(tmp_path / "many" / f"v{number}.mp4", 12 + number)
    parts = [given["train_annot"][0], {"annotation": str(tmp_path / "many"), "per_batch": 3, "labelled": False}]
    given |= {"train_annot": parts, "num_epochs": 1}
    with pytest.raises(UserError, match=r"many is a folder of videos.*objective\.config\.prompts"):
        load_config(None, given)
    (tmp_path / "prompts.txt").write_text("a red thing\na blue thing\na tree\n")
    given["objective"] = {"method": "distillation", "config": {"prompts": str(tmp_path / "prompts.txt")}}
    found = fit(load_config(None, given))
    assert found.folder is not None
    lines = [json.loads(line) for line in (found.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["terms"]["distillation"] > 0 for line in lines if line["event"] == "train")
    (tmp_path / "config.json").write_text(json.dumps(given))
    capsys.readouterr()
    code, report = checked(capsys, "--config", str(tmp_path / "config.json"))
    assert code == 0 and kinds(report, "fails") == set()
    for labelled in (str(tmp_path / "many"), [parts[0], {**parts[1], "labelled": True}]):
        with pytest.raises(UserError, match="many is a folder without tar shards, so its videos have no captions"):
            load_config(None, {**given, "train_annot": labelled, "objective": None})


def test_the_check_tries_steps_with_the_teacher(
    given: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(given))
    code, found = checked(capsys, "--config", str(tmp_path / "config.json"))
    assert code == 0 and kinds(found, "fails") == set()
    assert finding(found, "time", "run").items["batch_size"] == 4
