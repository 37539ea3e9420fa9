"""Several commands on one study, as a user starts them, of which one is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

ROOT = Path(__file__).parents[2]
POINTS = [1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 7e-4]


def trials(journal: Path) -> list[FrozenTrial]:
    if not journal.exists():
        return []
    storage = JournalStorage(JournalFileBackend(str(journal)))
    studies = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=studies[0], storage=storage).trials if studies else []


@pytest.mark.slow
def test_three_commands_of_which_one_is_killed_try_each_point_once(project: dict[str, Any], tmp_path: Path) -> None:
    journal, config = tmp_path / "optuna.journal", tmp_path / "config.json"
    search = {
        "n_trials": len(POINTS),
        "sampler": {"name": "GridSampler"},
        "pruner": "none",
        "storage": str(journal),
        "opt_params": {"learning_rate": {"choices": POINTS}},
    }
    config.write_text(json.dumps({**project, "num_epochs": 20, "output_dir": str(tmp_path), "optuna_cfg": search}))
    command = [sys.executable, "train.py", "--config", str(config)]
    workers = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(3)
    ]
    deadline = time.monotonic() + 400
    while not (running := [trial for trial in trials(journal) if trial.state == TrialState.RUNNING]):
        assert time.monotonic() < deadline and all(worker.poll() is None for worker in workers)
        time.sleep(0.1)
    while "lease" not in running[0].user_attrs:
        running = [trials(journal)[running[0].number]]
    killed = running[0].user_attrs["lease"]["pid"]
    os.kill(killed, signal.SIGKILL)
    outputs = {worker.pid: worker.communicate(timeout=400)[0] for worker in workers}
    assert sorted(worker.returncode for worker in workers) == [-signal.SIGKILL, 0, 0], outputs
    found = trials(journal)
    assert Counter(t.params["learning_rate"] for t in found if t.state == TrialState.COMPLETE) == Counter(POINTS)
    lost = [trial for trial in found if trial.state == TrialState.FAIL and "surplus" not in trial.user_attrs]
    assert [trial.number for trial in lost] == [running[0].number]
    for pid, output in outputs.items():
        assert pid == killed or f"{len(POINTS)} trials: {len(POINTS)} completed" in output
