"""torchrun and accelerate launch as a user calls them; half a minute each, so only with `pytest -m slow`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["train.py", "--config", "cfgs/demo.json", "--data_subset", "60", "--num_workers", "0", "--device", "cpu"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate launch"])
def test_two_processes_train(launcher: list[str], tmp_path: Path) -> None:
    command = [*launcher, *SHORT, "--num_epochs", "1", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("finetuned ") == 1
    assert "find_unused_parameters" not in done.stderr
    (folder,) = (tmp_path / "dataset_example").iterdir()
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_one_can_resume(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [*TORCHRUN, *SHORT, "--num_epochs", "20", "--save_every_steps", "1", "--output_dir", str(tmp_path)]
    with log.open("w") as output:
        run = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=output)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("dataset_example/*/last-*")):
        assert run.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    one = next(child for child in psutil.Process(run.pid).children() if child.environ().get("RANK") == "1")
    one.kill()
    assert run.wait(60) != 0
    # torchrun says which process was killed; the other one, which it ends, says how to resume.
    assert "Signal 9 (SIGKILL)" in log.read_text() and "To resume: python train.py --resume" in log.read_text()
    (folder,) = (tmp_path / "dataset_example").iterdir()
    dry = subprocess.run(
        [sys.executable, "train.py", "--resume", str(folder), "--num_epochs", "20", "--dry_run"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert dry.returncode == 0, dry.stderr
