"""The real optuna-dashboard on studies of real searches: what a browser shows of them, and what it cannot harm."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import browser
import optuna
import pytest

from adaclip_finetune.config import load_config
from adaclip_finetune.tuning import search as searching

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
HEADLESS = [*browser.HEADLESS, "--virtual-time-budget=20000"]  # milliseconds; waiting for nothing takes none


@contextmanager
def dashboard(storage: str, log: Path) -> Iterator[str]:
    """Watching `storage`, on a free port of this machine alone; gives its URL."""
    program = shutil.which("optuna-dashboard", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("no optuna-dashboard here (pip install optuna-dashboard)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [program, storage, "--port", str(port), "--server", "wsgiref"], stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                asked(f"{url}/api/meta")
                break
            except URLError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def asked(url: str, method: str = "GET") -> dict[str, Any]:
    with urlopen(Request(url, method=method), timeout=60) as answer:
        return dict(json.loads(answer.read() or b"{}"))


def shown(url: str, profile: Path) -> str:
    """The words that a browser has on the page when all scripts have run."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    done = subprocess.run(
        [chromium, *HEADLESS, f"--user-data-dir={profile}", "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    words = re.sub(r"<(script|style)\b.*?</\1>|<[^>]+>", " ", done.stdout, flags=re.DOTALL)
    return " ".join(unescape(words).split())


def settings(project: dict[str, object], folder: Path, **optuna_cfg: Any) -> dict[str, Any]:
    storage = f"sqlite:///{folder}/optuna.db"
    return {**project, "output_dir": str(folder / "out"), "optuna_cfg": {"storage": storage, **optuna_cfg}}


def test_a_browser_finds_the_trials(
    project: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "draw_study", lambda *_: None)
    sampler = {"name": "GridSampler"}
    space = {"top_k": {"choices": [2, 7]}, "learning_rate": {"choices": [0.00125]}}  # 7 of 6 frames are refused
    given = settings(project, tmp_path, study_name="shapes-full", sampler=sampler, opt_params=space)
    config = load_config(None, given)
    searching.search(config)
    optuna.logging.set_verbosity(optuna.logging.INFO)
    storage = given["optuna_cfg"]["storage"]
    study = optuna.load_study(study_name="shapes-full", storage=storage)
    best, refused = sorted(study.trials, key=lambda trial: trial.params["top_k"])

    with dashboard(storage, tmp_path / "log") as url:
        assert "1. shapes-full Direction: MAXIMIZE" in shown(f"{url}/dashboard", tmp_path / "profile")
        overview = shown(f"{url}/dashboard/studies/1", tmp_path / "profile")
        assert "shapes-full (id=1)" in overview and f"Best Trial (number={best.number})" in overview
        assert "learning_rate: 0.00125" in overview and "top_k: 2" in overview
        assert "t2v.R@1 on validation" in overview
        trials = shown(f"{url}/dashboard/studies/1/trials?numbers={refused.number}", tmp_path / "profile")
    assert "2 Trials" in trials
    assert f"Trial {best.number} Complete" in trials and f"Trial {refused.number} Pruned" in trials
    assert "top_k 7" in trials and "learning_rate 0.00125" in trials
    assert "reason refused: top_k 7 is more than num_frm 6" in trials


def test_watching_a_search_that_runs(
    project: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "draw_study", lambda *_: None)
    space = {"learning_rate": {"range": [1e-5, 1e-2], "log": True}}
    begun = settings(project, tmp_path, n_trials=1, pruner="none", opt_params=space)
    searching.search(load_config(None, begun))
    optuna.logging.set_verbosity(optuna.logging.INFO)
    (tmp_path / "search.json").write_text(json.dumps(begun))
    log = tmp_path / "search.log"
    seen, refused = [], None
    with dashboard(begun["optuna_cfg"]["storage"], tmp_path / "dashboard.log") as url, log.open("w") as output:
        running = subprocess.Popen(
            [sys.executable, TRAIN, "--config", tmp_path / "search.json", "--optuna_cfg.n_trials", "12"],
            stdout=output,
            stderr=output,
        )
        try:
            while running.poll() is None:
                seen += [trial["state"] for trial in asked(f"{url}/api/studies/1?after=0")["trials"]]
                if refused is None and "trial 1 (2 of 12)" in log.read_text():
                    with pytest.raises(HTTPError) as refused:
                        asked(f"{url}/api/studies/1", "DELETE")
                    refused.value.close()
                time.sleep(0.2)
        finally:
            running.kill()
        last = asked(f"{url}/api/studies/1?after=0")
    assert running.returncode == 0, log.read_text()
    assert refused is not None, "the search was over before it was looked at"
    assert "Running" in seen
    assert [trial["state"] for trial in last["trials"]] == ["Complete"] * 12
    assert [len(trial["intermediate_values"]) for trial in last["trials"]] == [2] * 12
    assert "12 trials: 12 completed, 0 pruned, 0 failed" in log.read_text()
