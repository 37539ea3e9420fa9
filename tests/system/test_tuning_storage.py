"""Where studies are stored: SQLite for one process, journal files and PostgreSQL for several, of which some die."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

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
        log = (tmp_path / f"{number}.log").read_text()
        assert worker.exitcode == 0 and "5 trials: 5 completed, 0 pruned, 0 failed" in log, log
    trials = study_of(config).trials
    failed = [trial.number for trial in trials if trial.state == TrialState.FAIL and "surplus" not in trial.user_attrs]
    assert failed == [0]
    completed = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(completed) == 5 and [t.params for t in completed if history(t) == [0]] == [trials[0].params]
    assert len({trial.params["learning_rate"] for trial in completed}) == 5, "no two processes try the same values"
    assert len(list((tmp_path / "out" / "tiny").iterdir())) == 1, "all processes write into one folder"


def test_a_killed_process_on_sqlite_is_noticed_at_once(project: Project, tmp_path: Path) -> None:
    config = settings(project, tmp_path, {"n_trials": 2})
    first = start_held(config, tmp_path / "log")
    with pytest.raises(UserError, match=rf"o\.db is .* process {first.pid}"):
        tune(config)
    first.kill()
    first.join()
    tune(config)
    trials = study_of(config).trials
    assert states(config) == ["FAIL", "COMPLETE", "COMPLETE"] and trials[1].params == trials[0].params
    assert not list(tmp_path.glob(".*lock"))


def test_ctrl_c_ends_a_worker_with_130_and_its_values_are_tried_again(project: Project, tmp_path: Path) -> None:
    config = settings(project, tmp_path, {"n_trials": 1, "storage": "optuna.journal"})
    worker = start_held(config, tmp_path / "log")
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
    with open_storage("sqlite:///{a} ü'\".db") as storage:  # a name with what Optuna would format
        study = optuna.create_study(storage=storage, study_name="s")
        for _ in range(ATTEMPTS):
            running_trial(study)
            DeadTrials(study, 0.0).retry()
        assert [trial.state.name for trial in study.trials] == ["FAIL"] * ATTEMPTS
        assert [trial.number for trial in points(study.trials)] == [ATTEMPTS - 1]
    assert [path.name for path in Path().iterdir()] == ["{a} ü'\".db"]


def test_places_are_those_of_an_uninterrupted_study() -> None:
    study = optuna.create_study()
    for _ in range(3):
        study.ask()
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


def test_what_happens_to_a_study_meanwhile(
    project: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    server: postgres.Server,
) -> None:
    """A trial is taken for dead by another process, the study is deleted, and the server goes away."""

    def tune_while(config: Config, does: Any) -> None:
        calls: list[int] = []

        def trial(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 1:
                does()
            return quick_trial(*arguments)

        monkeypatch.setattr(tuning_run, "run_trial", trial)
        tune(config)

    journal = settings(project, tmp_path, {"storage": "optuna.journal", "n_trials": 2})
    tune_while(journal, lambda: retry(study_of(journal), 0))
    assert "trial 0 was taken for dead" in capsys.readouterr().out
    assert states(journal) == ["FAIL", "COMPLETE", "COMPLETE"]

    for storage in (f"sqlite:///{tmp_path}/o.db", "b.journal"):
        config = settings(project, tmp_path, {"storage": storage})
        with pytest.raises(UserError, match="tiny-full was deleted or renamed"):
            tune_while(config, lambda of=config: optuna.delete_study(study_name="tiny-full", storage=storage_of(of)))

    config = settings(project, tmp_path, {"storage": server.url, "study_name": "gone"})
    try:
        with pytest.raises(UserError, match=r"postgresql\+\w+://owner:\*\*\*@") as told:
            tune_while(config, server.stop)
    finally:
        server.start()
    assert postgres.PASSWORD not in str(told.value)


def test_the_dashboard_shows_the_study(project: Project, tmp_path: Path) -> None:
    config = settings(project, tmp_path, {"n_trials": 1})
    tune(config)
    assert config.optuna_cfg is not None
    app = pytest.importorskip("optuna_dashboard").wsgi(config.optuna_cfg.storage)
    for path, shown in {"/api/studies": b"tiny-full", "/api/studies/1": b"t2v.R@1 on validation"}.items():
        environ: dict[str, Any] = {"PATH_INFO": path, "QUERY_STRING": "after=0"}
        setup_testing_defaults(environ)
        assert shown in b"".join(app(environ, lambda *_: None))


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
    with pytest.raises(UserError, match=r"^optuna_cfg\.storage") as error, open_storage(url):
        pass
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
