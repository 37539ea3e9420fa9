"""The examples of docs/extending.md, taken from the page, work as the page says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```python\n# (adaclip_finetune/\S+)\n(.*?)```", re.DOTALL)
LINE = re.compile(r"\n    # (\w+): (\".*,)\n")
# Runs all commands of all examples in one process, since it takes seconds to import the package.
COMMANDS = """
import json, sys
from pathlib import Path
from adaclip_finetune.cli import main
codes = {}
for example, commands in json.load(sys.stdin).items():
    codes[example] = []
    for words in commands:
        run = next(Path(example).glob("out/tiny/*"), None)
        codes[example].append(main([word.replace("RUN", str(run)) for word in words]))
Path("codes.json").write_text(json.dumps(codes))
"""

Project = dict[str, Any]


class Extended(NamedTuple):
    """The folder with a subfolder for each example, and the output of all commands."""

    folder: Path
    output: str
    codes: dict[str, list[int]]

    def run(self, example: str) -> Path:
        assert self.codes[example] and not any(self.codes[example]), self.output
        (run,) = (self.folder / example / "out" / "tiny").iterdir()
        return run

    def events(self, example: str, kind: str) -> list[dict[str, Any]]:
        lines = (self.run(example) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def mean_ranks(self, example: str) -> list[float]:
        """Return the mean rank of each finetuned row that `adaclip evaluate` found, and that of the run itself."""
        table = json.loads((self.folder / example / "table.json").read_text())
        own = json.loads((self.run(example) / "metrics.json").read_text())["finetuned"]
        return [row["t2v"]["MeanR"] for row in (*table["rows"][1:], own)]


@pytest.fixture(scope="module")
def extended(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Extended:
    """A copy of the package with all examples of the page, after each was trained and evaluated."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(
        ROOT / "adaclip_finetune", folder / "adaclip_finetune", ignore=shutil.ignore_patterns("__pycache__")
    )
    for place, code in BLOCK.findall(PAGE):
        if "/config/choices/" in place:
            add_choice(folder / place, code)
        else:
            assert not (folder / place).exists()
            (folder / place).write_text(code, encoding="utf-8")

    def train(example: str, name: str = "config", **settings: Any) -> list[str]:
        path = folder / example / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**project, "output_dir": f"{example}/out", **settings}))
        return ["train", "--config", str(path)]

    def evaluate(example: str, *weights: str) -> list[str]:
        return ["evaluate", *weights, "--annot", project["test_annot"], "--json", f"{example}/table.json"]

    backwards = folder / "backwards.json"
    backwards.write_text(json.dumps(dict(reversed(json.loads(Path(project["test_annot"]).read_text()).items()))))
    tower = {"method": "shared_class", "config": {"at": 1, "share": 0.25}}
    lora = {"method": "lora", "config": {"rank": 2}}
    certain = {"method": "certain", "config": {"step": 0.5}}
    only_test = {"do_inference": True, "no_output": True}
    commands = {
        "schema": [["schema"]],
        "peft": [
            train("peft", peft={"method": "row_scale"}, coef_lr=1.0, learning_rate=0.01),
            evaluate("peft", "RUN/best.safetensors", "RUN/adapter.safetensors"),
        ],
        "tower": [train("tower", tower=tower, peft=lora, gradient_checkpointing=True), evaluate("tower", "RUN")],
        "objective": [train("objective", objective={"method": "margin", "config": {"margin": 0.3}})],
        "task": [train("task", task={"method": "multiple_choice", "config": {"choices": 3}})],
        "adaptation": [
            train("adaptation", "none", **only_test, save_similarity="none.npy"),
            train("adaptation", "certain", **only_test, save_similarity="certain.npy", adaptation=certain),
            train(
                "adaptation", "back", **only_test, save_similarity="back.npy", adaptation=certain,
                test_annot=str(backwards),
            ),
        ],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input=json.dumps(commands),
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return Extended(folder, done.stdout + done.stderr, json.loads((folder / "codes.json").read_text()))


def add_choice(path: Path, code: str) -> None:
    """Put the settings class above its table, and the line into the table."""
    (table, line), settings = LINE.findall(code)[0], LINE.sub("\n", code).rstrip()
    before, start, rest = path.read_text(encoding="utf-8").partition(f"\n{table}: dict[str, Choice] = {{\n")
    assert start, table
    path.write_text(f"{before}\n{settings}\n\n{start}    {line}\n{rest}", encoding="utf-8")


def test_every_kind_of_choice_has_an_example_that_the_schema_shows(extended: Extended) -> None:
    names = re.findall(r"# [A-Z]+: \"(\w+)\"", PAGE)
    assert len(names) == 5 and all(name in extended.output for name in names)


def test_the_peft_method_learns_and_is_merged(extended: Extended, project: Project) -> None:
    state = load_file(extended.run("peft") / "best.safetensors")
    before = load_file(Path(project["clip_weights"]) / "open_clip_model.safetensors")
    moved = {name for name, tensor in before.items() if not tensor.equal(state[f"clip.{name}"])}
    assert moved and all(re.search(r"mlp\.c_(fc|proj)\.weight$", name) for name in moved)
    weights, adapter, own = extended.mean_ranks("peft")
    assert weights == adapter == own


def test_the_tower_trains_with_selection_and_another_method(extended: Extended) -> None:
    found, own = extended.mean_ranks("tower")
    assert found == own


def test_the_objective_trains(extended: Extended) -> None:
    losses = [event["loss"] for event in extended.events("objective", "train")]
    assert losses and all(0 < loss < 2 * (0.3 + 2) for loss in losses)


def test_the_task_chooses_the_best_epoch(extended: Extended) -> None:
    found = json.loads((extended.run("task") / "metrics.json").read_text())
    assert set(found["finetuned"]) == {"accuracy"}
    by_epoch = [event["metrics"]["accuracy"] for event in extended.events("task", "validation")]
    assert found["best_validation"]["accuracy"] == max(by_epoch) == by_epoch[found["best_epoch"] - 1]


def test_the_adaptation_changes_answers_and_is_undone(extended: Extended) -> None:
    assert extended.codes["adaptation"] == [0, 0, 0], extended.output
    none, adapted, back = (np.load(extended.folder / f"{name}.npy") for name in ("none", "certain", "back"))
    assert not np.allclose(none, adapted, atol=1e-3)
    # The change for a query is undone before the next one: a row does not depend on the rows before it.
    np.testing.assert_allclose(back[::-1, ::-1], adapted, atol=1e-4)
