"""Where studies are stored: SQLite for one process, journal files and PostgreSQL for several, of which some die."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import optuna
import postgres
import pytest
from optuna.trial import TrialState
from tuned import quick_trial, settings, start_worker, states, storage_of, study_of, use_quick_trials

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError
from adaclip_finetune.tuning import run as tuning_run
from adaclip_finetune.tuning import study as tuning_study
from adaclip_finetune.tuning.run import tune
from adaclip_finetune.tuning.study import open_storage, storage_errors, without_password

Project = dict[str, Any]
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trials of milliseconds, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    use_quick_trials(monkeypatch.setattr)


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    with postgres.running() as running:
        yield running


def start_held(config: Config, log: Path) -> Any:
    """Start a process, and return it when it is in its first trial, which never ends."""
    began, never = forked.context().Event(), forked.context().Event()
    worker = start_worker(config, log, began, never)
    assert began.wait(60), log.read_text()
    return worker


@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_several_processes_share_the_trials_although_one_is_killed(
    project: Project, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    storage = "optuna.journal" if kind == "journal" else request.getfixturevalue("server").url
    config = settings(project, tmp_path, {"storage": storage, "n_trials": 5, "pruner": "none"}, num_epochs=1)
    victim = start_held(config, tmp_path / "victim.log")
    began, go = forked.context().Event(), forked.context().Event()
    go.set()
    others = [start_worker(config, tmp_path / f"{number}.log", began, go) for number in range(2)]
    victim.kill()
    for number, worker in enumerate(others):
        worker.join(120)
        assert worker.exitcode == 0, (tmp_path / f"{number}.log").read_text()
    completed = [trial for trial in study_of(config).trials if trial.state == TrialState.COMPLETE]
    assert 5 <= len(completed) <= 6, "a process ends the trial that it has begun"
    assert len({trial.params["learning_rate"] for trial in completed}) == len(completed)
    assert len(list((tmp_path / "out" / "tiny").iterdir())) == 1, "all processes write into one folder"


def test_the_values_of_a_killed_process_are_tried_again(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_study, "HEARTBEAT_S", 1)
    monkeypatch.setattr(tuning_study, "SILENCE_S", 1)
    config = settings(project, tmp_path)
    first = start_held(config, tmp_path / "log")
    first.kill()
    first.join()
    for n_trials in range(1, 100):  # until the heartbeat of the trial is old enough
        tune(settings(project, tmp_path, {"n_trials": n_trials}))
        if study_of(config).trials[0].state == TrialState.FAIL:
            break
    trials = study_of(config).trials
    assert any(trial.params == trials[0].params and trial.state == TrialState.COMPLETE for trial in trials)


def test_ctrl_c_ends_a_worker_with_130_and_its_values_are_tried_again(project: Project, tmp_path: Path) -> None:
    config = settings(project, tmp_path, {"n_trials": 1, "storage": "optuna.journal"})
    worker = start_held(config, tmp_path / "log")
    os.kill(worker.pid, signal.SIGINT)
    worker.join(60)
    assert worker.exitcode == 130
    tune(config)
    trials = study_of(config).trials
    assert states(config) == ["FAIL", "COMPLETE"] and trials[0].params == trials[1].params


def test_a_study_that_is_deleted_and_a_server_that_goes_away_are_told(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: postgres.Server
) -> None:
    def tune_while(config: Config, does: Callable[[], None]) -> str:
        def trial(*arguments: Any) -> Any:
            does()
            return quick_trial(*arguments)

        monkeypatch.setattr(tuning_run, "run_trial", trial)
        with pytest.raises(UserError, match=r"^optuna_cfg\.storage") as told:
            tune(config)
        return str(told.value)

    for storage in (f"sqlite:///{tmp_path}/o.db", "b.journal"):
        config = settings(project, tmp_path, {"storage": storage})
        told = tune_while(config, lambda of=config: optuna.delete_study(study_name="tiny-full", storage=storage_of(of)))
        assert "deleted" in told
    config = settings(project, tmp_path, {"storage": server.url, "study_name": "gone"})
    try:
        told = tune_while(config, server.stop)
    finally:
        server.start()
    assert "owner:***@" in told and postgres.PASSWORD not in told


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("sqlite:///nowhere/optuna.db", "nowhere"),
        ("sqlite:///a.journal", "file is not a database"),
        ("nowhere/optuna.journal", "nowhere"),
        ("notes.txt", "notes.txt"),
        ("mongo://u:geheim@h", "mongo"),
        ("postgresql://u:geheim@h:port/d", "%40"),
        ("postgresql+psycopg://u:geheim/a@b@127.0.0.1:1/d", "%40"),
        ("mysql://u:geheim@h/d", "MySQLdb"),
        ("postgresql+psycopg://u:geheim@127.0.0.1:1/d", "refused"),
        ("postgresql+psycopg://127.0.0.1:1/d?user=u&password=geheim", "refused"),
    ],
)
def test_a_storage_that_cannot_be_used_is_told_without_the_password(url: str, told: str) -> None:
    Path("a.journal").write_bytes(b'{"op_code": 0}\n')
    Path("notes.txt").write_bytes(b"what I\nthought of\n")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(UserError, match=r"^optuna_cfg\.storage") as error, storage_errors(url):
        open_storage(url)
    assert told in str(error.value) and "geheim" not in str(error.value)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:a{b}:c%40d@h:1/d", "postgresql://u:***@h:1/d"),
        ("postgresql:///d?user=u&password=geheim&host=h", "postgresql:///d?user=u&password=***&host=h"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("sqlite:///optuna.db", "sqlite:///optuna.db"),
    ],
)
def test_what_is_shown_has_no_password(url: str, shown: str) -> None:
    assert without_password(url) == shown
