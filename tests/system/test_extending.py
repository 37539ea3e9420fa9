"""The examples of docs/extending.md, taken from the page, work as it says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"```python\n# (adaclip_finetune/\S+)\n(.*?)```", re.DOTALL)
LINE = re.compile(r"\n    # (\w+): (\".*,)\n")

Project = dict[str, Any]


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package into which every example of the page is put."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(
        ROOT / "adaclip_finetune", folder / "adaclip_finetune", ignore=shutil.ignore_patterns("__pycache__")
    )
    for place, code in BLOCK.findall((ROOT / "docs/extending.md").read_text(encoding="utf-8")):
        if place.endswith("config/choices.py"):
            _add_choice(folder / place, code)
        else:
            assert not (folder / place).exists()
            (folder / place).write_text(code, encoding="utf-8")
    return folder


def _add_choice(path: Path, code: str) -> None:
    """The settings class above its table, and the line into it."""
    (table, line), settings = LINE.findall(code)[0], LINE.sub("\n", code).rstrip()
    before, start, rest = path.read_text(encoding="utf-8").partition(f"\n{table}: dict[str, Choice] = {{\n")
    assert start, table
    path.write_text(f"{before}\n{settings}\n\n{start}    {line}\n{rest}", encoding="utf-8")


def adaclip(extended: Path, *commands: list[str]) -> str:
    """Run commands with the extended package, one after the other in one process."""
    code = """
import json, sys
from adaclip_finetune.cli import main
sys.exit(max(main(words) for words in json.loads(sys.argv[1])))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": str(extended)},
        cwd=extended,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(project: Project, folder: Path, **settings: Any) -> list[str]:
    """The command of a run with these settings, whose folder `run_in` finds."""
    config = folder / f"{len(list(folder.iterdir()))}.json"
    config.write_text(json.dumps({**project, "output_dir": str(folder / "out"), **settings}))
    return ["train", "--config", str(config)]


def run_in(folder: Path) -> Path:
    (run,) = (folder / "out" / "tiny").iterdir()
    return run


def test_every_kind_of_choice_has_an_example_that_help_shows(extended: Path) -> None:
    code = "from adaclip_finetune.config import Config; print(Config.model_json_schema())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(extended)},
        cwd=extended,
        capture_output=True,
        text=True,
    )
    names = re.findall(r"# [A-Z]+: \"(\w+)\"", (ROOT / "docs/extending.md").read_text(encoding="utf-8"))
    assert len(names) == 5 and all(name in done.stdout for name in names)


def test_the_peft_method_learns_and_is_merged(extended: Path, project: Project, tmp_path: Path) -> None:
    adaclip(extended, train(project, tmp_path, peft={"method": "row_scale"}, coef_lr=1.0, learning_rate=0.01))
    run, table = run_in(tmp_path), tmp_path / "t.json"
    state = load_file(run / "best.safetensors")
    before = load_file(Path(project["clip_weights"]) / "open_clip_model.safetensors")
    moved = {name for name, tensor in before.items() if not tensor.equal(state[f"clip.{name}"])}
    assert moved and all(re.search(r"mlp\.c_(fc|proj)\.weight$", name) for name in moved)
    figures = json.loads((run / "metrics.json").read_text())["finetuned"]["t2v"]
    weights = [str(run / name) for name in ("best.safetensors", "adapter.safetensors")]
    adaclip(extended, ["evaluate", *weights, "--annot", project["test_annot"], "--json", str(table)])
    assert [row["t2v"]["MeanR"] for row in json.loads(table.read_text())["rows"][1:]] == [figures["MeanR"]] * 2


def test_the_tower_trains_with_selection_and_another_method(extended: Path, project: Project, tmp_path: Path) -> None:
    tower = {"method": "shared_class", "config": {"at": 1, "share": 0.25}}
    lora = {"method": "lora", "config": {"rank": 2}}
    adaclip(extended, train(project, tmp_path, tower=tower, peft=lora, gradient_checkpointing=True))
    run, table = run_in(tmp_path), tmp_path / "t.json"
    adaclip(extended, ["evaluate", str(run), "--annot", project["test_annot"], "--json", str(table)])
    figures = json.loads((run / "metrics.json").read_text())["finetuned"]["t2v"]
    assert json.loads(table.read_text())["rows"][-1]["t2v"]["MeanR"] == figures["MeanR"]


def test_the_objective_trains(extended: Path, project: Project, tmp_path: Path) -> None:
    adaclip(extended, train(project, tmp_path, objective={"method": "margin", "config": {"margin": 0.3}}))
    events = [json.loads(line) for line in (run_in(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "train"]
    assert losses and all(0 < loss < 2 * (0.3 + 2) for loss in losses)


def test_the_task_chooses_the_best_epoch(extended: Path, project: Project, tmp_path: Path) -> None:
    task = {"method": "multiple_choice", "config": {"choices": 3}}
    adaclip(extended, train(project, tmp_path, task=task))
    found = json.loads((run_in(tmp_path) / "metrics.json").read_text())
    assert set(found["finetuned"]) == {"accuracy"}
    events = [json.loads(line) for line in (run_in(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    by_epoch = [event["metrics"]["accuracy"] for event in events if event["event"] == "validation"]
    assert found["best_validation"]["accuracy"] == max(by_epoch) == by_epoch[found["best_epoch"] - 1]


def test_the_adaptation_changes_answers_and_is_undone(extended: Path, project: Project, tmp_path: Path) -> None:
    given = {"do_inference": True, "no_output": True}
    certain = {"method": "certain", "config": {"step": 0.5}}
    backwards = tmp_path / "backwards.json"
    entries = json.loads(Path(project["test_annot"]).read_text())
    backwards.write_text(json.dumps(dict(reversed(entries.items()))))
    runs: list[Project] = [
        {"save_similarity": str(tmp_path / "none.npy")},
        {"save_similarity": str(tmp_path / "certain.npy"), "adaptation": certain},
        {"save_similarity": str(tmp_path / "back.npy"), "adaptation": certain, "test_annot": str(backwards)},
    ]
    adaclip(extended, *(train(project, tmp_path, **given, **settings) for settings in runs))
    none, adapted, back = (np.load(tmp_path / f"{name}.npy") for name in ("none", "certain", "back"))
    assert not np.allclose(none, adapted, atol=1e-3)
    # What was done for a query is undone before the next: a row does not depend on those before it.
    np.testing.assert_allclose(back[::-1, ::-1], adapted, atol=1e-4)
