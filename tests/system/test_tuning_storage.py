"""Where studies are stored: SQLite for one process, journal files and PostgreSQL for several, of which some die."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import optuna
import postgres
import pytest
from optuna.trial import TrialState
from tuned import quick_trial, settings, start_worker, storage_of, study_of, use_quick_trials

from adaclip_finetune.errors import UserError
from adaclip_finetune.tuning import run as tuning_run
from adaclip_finetune.tuning import study as tuning_study
from adaclip_finetune.tuning.run import tune
from adaclip_finetune.tuning.study import (
    ATTEMPTS,
    DeadTrials,
    history,
    open_storage,
    place,
    points,
    retry,
    without_password,
)

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


@pytest.fixture(params=["journal", "postgresql"])
def shared(request: pytest.FixtureRequest) -> str:
    """A storage for several processes."""
    if request.param == "journal":
        return "optuna.journal"
    server = request.getfixturevalue("server")
    server.sql("DROP DATABASE IF EXISTS several")
    server.sql("CREATE DATABASE several")
    return str(server.text(database="several"))


# ---- several processes, and dead ones ----


def test_several_processes_share_the_trials_although_one_is_killed(
    project: Project, tmp_path: Path, shared: str
) -> None:
    config = settings(project, tmp_path, {"storage": shared, "n_trials": 8, "pruner": "none"}, num_epochs=1)
    context = forked.context()
    began, never, go = context.Event(), context.Event(), context.Event()
    go.set()
    victim = start_worker(config, tmp_path / "victim.log", began, never)
    assert began.wait(60), (tmp_path / "victim.log").read_text()
    others = [start_worker(config, tmp_path / f"{number}.log", began, go) for number in range(2)]
    victim.kill()
    for number, worker in enumerate(others):
        worker.join(120)
        assert worker.exitcode == 0, (tmp_path / f"{number}.log").read_text()
        assert "8 trials: 8 completed, 0 pruned, 0 failed" in (tmp_path / f"{number}.log").read_text()
    trials = study_of(config).trials
    failed = [trial.number for trial in trials if trial.state == TrialState.FAIL and "surplus" not in trial.user_attrs]
    assert failed == [0]
    completed = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(completed) == 8 and [t.params for t in completed if history(t) == [0]] == [trials[0].params]
    assert len({trial.params["learning_rate"] for trial in completed}) == 8, "no two processes try the same values"
    assert len(list((tmp_path / "out" / "tiny").iterdir())) == 1, "all processes write into one folder"


def test_a_killed_process_on_sqlite_is_noticed_at_once(project: Project, tmp_path: Path) -> None:
    config = settings(project, tmp_path, {"n_trials": 2})
    context = forked.context()
    began, never = context.Event(), context.Event()
    first = start_worker(config, tmp_path / "log", began, never)
    assert began.wait(60), (tmp_path / "log").read_text()
    with pytest.raises(UserError, match=rf"o\.db is being written by process {first.pid}"):
        tune(config)
    first.kill()
    first.join()
    tune(config)
    trials = study_of(config).trials
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert trials[1].params == trials[0].params
    assert not list(tmp_path.glob(".*lock"))


def test_ctrl_c_ends_a_worker_with_130_and_its_values_are_tried_again(project: Project, tmp_path: Path) -> None:
    config = settings(project, tmp_path, {"n_trials": 1, "storage": "optuna.journal"})
    context = forked.context()
    began, never = context.Event(), context.Event()
    worker = start_worker(config, tmp_path / "log", began, never)
    assert began.wait(60), (tmp_path / "log").read_text()
    os.kill(worker.pid, signal.SIGINT)
    worker.join(60)
    assert worker.exitcode == 130
    tune(config)
    assert [(t.state.name, history(t)) for t in study_of(config).trials] == [("FAIL", []), ("COMPLETE", [0])]


def running_trial(study: optuna.Study) -> optuna.Trial:
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    return trial


def test_a_trial_is_dead_when_its_heartbeat_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(tuning_study.time, "monotonic", lambda: now[0])
    with open_storage("optuna.journal") as storage:
        study = optuna.create_study(storage=storage, study_name="s")
        alive, silent = running_trial(study), running_trial(study)
        dead = DeadTrials(study, tuning_study.SILENCE_S)
        for seconds in (0, 100, 200):
            now[0] = seconds
            alive.set_user_attr("heartbeat", -seconds)  # the clock of another machine may say anything
            dead.retry()
        assert [trial.state.name for trial in study.trials] == ["RUNNING", "FAIL", "WAITING"]
        again = study.ask()
        assert (again.number, again.suggest_float("x", 0, 1)) == (2, study.trials[silent.number].params["x"])


def test_values_that_killed_three_processes_are_given_up() -> None:
    with open_storage("sqlite:///o.db") as storage:
        study = optuna.create_study(storage=storage, study_name="s")
        for _ in range(ATTEMPTS):
            running_trial(study)
            DeadTrials(study, 0.0).retry()
        assert [trial.state.name for trial in study.trials] == ["FAIL"] * ATTEMPTS
        assert [trial.number for trial in points(study.trials)] == [ATTEMPTS - 1]


def test_places_are_those_of_an_uninterrupted_study() -> None:
    study = optuna.create_study()
    for number in range(3):
        study.tell(study.ask(), 1.0) if number != 1 else study.tell(study.ask(), state=TrialState.FAIL)
    retry(study, 1)
    surplus = study.ask(), study.ask()
    surplus[1].set_user_attr("surplus", True)
    study.ask()
    trials = study.trials
    assert [place(trials, number) for number in range(6)] == [0, 1, 2, 1, 3, 3]
    assert [trial.number for trial in points(trials)] == [0, 2, 3, 5]


def test_one_trial_too_many_is_not_trained(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process begins the last trial while this one asks for it."""
    config = settings(project, tmp_path, {"storage": "optuna.journal", "n_trials": 2})
    real = optuna.Study.ask

    def ask(study: optuna.Study, *arguments: Any) -> optuna.Trial:
        if len(study.trials) == 1:
            study.add_trial(optuna.create_trial(value=1.0))
        return real(study, *arguments)

    monkeypatch.setattr(optuna.Study, "ask", ask)
    tune(config)
    assert [trial.user_attrs.get("surplus") for trial in study_of(config).trials] == [None, None, True]


def test_a_trial_that_another_process_ended_is_left_to_it(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(project, tmp_path, {"storage": "optuna.journal", "n_trials": 2})
    calls: list[int] = []

    def slept(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            other = study_of(config)
            other.tell(0, state=TrialState.FAIL)
            retry(other, 0)
        return quick_trial(*arguments)

    monkeypatch.setattr(tuning_run, "run_trial", slept)
    tune(config)
    assert "trial 0 was taken for dead" in capsys.readouterr().out
    trials = study_of(config).trials
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert trials[1].params == trials[0].params


@pytest.mark.parametrize("url", ["sqlite:///o.db", "optuna.journal"])
def test_a_study_that_is_deleted_meanwhile_is_told(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    config = settings(project, tmp_path, {"storage": url})

    def delete(*arguments: Any) -> Any:
        optuna.delete_study(study_name="tiny-full", storage=storage_of(config))
        return quick_trial(*arguments)

    monkeypatch.setattr(tuning_run, "run_trial", delete)
    with pytest.raises(UserError, match="tiny-full was deleted or renamed"):
        tune(config)


def test_a_server_that_goes_away_is_told(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: postgres.Server
) -> None:
    config = settings(project, tmp_path, {"storage": server.text()})

    def stopped(*arguments: Any) -> Any:
        server.stop()
        return quick_trial(*arguments)

    monkeypatch.setattr(tuning_run, "run_trial", stopped)
    try:
        with pytest.raises(UserError, match=r"postgresql\+\w+://owner:\*\*\*@") as told:
            tune(config)
    finally:
        server.start()
    assert postgres.PASSWORD not in str(told.value)


# ---- storages that cannot be used ----


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("sqlite:///nowhere/optuna.db", "nowhere"),
        ("sqlite:///a.journal", "file is not a database"),
        ("nowhere/optuna.journal", "nowhere"),
        (".", "Is a directory"),
        ("notes.txt", "notes.txt"),
        ("mongo://u:geheim@h", "mongo"),
        ("postgresql://u:geheim@h:port/d", "%40"),
        ("postgresql+psycopg://u:geheim/a@b@127.0.0.1:1/d", "%40"),
        ("mysql://u:geheim@h/d", "MySQLdb"),
        ("postgresql+pg8000://u:geheim@h/d", "pg8000"),
        ("postgresql+psycopg://u:geheim@127.0.0.1:1/d", "refused"),
        ("postgresql+psycopg://127.0.0.1:1/d?user=u&password=geheim", "refused"),
    ],
)
def test_a_storage_that_cannot_be_used_is_told_without_the_password(url: str, told: str) -> None:
    Path("a.journal").write_bytes(b'{"op_code": 0}\n')
    Path("notes.txt").write_bytes(b"what I\nthought of\n")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(UserError, match=r"^optuna_cfg\.storage") as error, open_storage(url):
        pass
    assert told in str(error.value) and "geheim" not in str(error.value)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_a_wrong_password_is_told_without_it(server: postgres.Server) -> None:
    with pytest.raises(UserError, match="authentication failed") as error, open_storage(server.text(password="geheim")):
        pass
    assert "geheim" not in str(error.value)


def test_names_with_braces_and_blanks() -> None:
    with open_storage("sqlite:///{a} ü'\".db") as storage:
        optuna.create_study(storage=storage)
    assert [path.name for path in Path().iterdir()] == ["{a} ü'\".db"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:a{b}:c%40d@h:1/d", "postgresql://u:***@h:1/d"),
        ("postgresql:///d?user=u&password=geheim&host=h", "postgresql:///d?user=u&password=***&host=h"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("sqlite:///optuna.db", "sqlite:///optuna.db"),
        ("optuna.journal", "optuna.journal"),
    ],
)
def test_what_is_shown_has_no_password(url: str, shown: str) -> None:
    assert without_password(url) == shown
