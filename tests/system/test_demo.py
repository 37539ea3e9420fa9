"""The demo as a newcomer runs it; it takes minutes, so only with `pytest -m slow` (.ci/run runs the demo anyway)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_demo_beats_zero_shot_by_far(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "--config", "cfgs/demo.json", "--output_dir", str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("zero-shot on test") < done.stdout.index("finetuned ")
    assert "run folder: " in done.stdout and "next: " in done.stdout
    (folder,) = (tmp_path / "dataset_example").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    chance = 100 / metrics["zero_shot"]["t2v"]["videos_listed"]
    assert metrics["zero_shot"]["t2v"]["R@1"] >= 3 * chance
    assert metrics["finetuned"]["t2v"]["R@1"] >= 25
    assert metrics["selected_on"] == "validation"
