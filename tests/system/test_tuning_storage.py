"""Where studies are kept: for one process or several, through deaths, and beside optuna-dashboard."""

import io
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import postgres
import pytest
from adaclip_finetune.tuning.journal import _process_ids
from adaclip_finetune.tuning.kept import StudyStorage
from adaclip_finetune.tuning.retries import requeue_lost
from adaclip_finetune.tuning.storage import open_storage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from study_worker import STUDY

from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import _began
from adaclip_finetune.tuning import signs

WORKER = Path(__file__).parents[1] / "study_worker.py"
POINTS = 6


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    with postgres.running() as running:
        yield running


def worker(url: str, log: Path, points: int = POINTS, seconds: float = 0.3, silence: int = 3) -> subprocess.Popen[Any]:
    words = [sys.executable, WORKER, url, str(points), str(seconds), "1", str(silence)]
    with log.open("ab") as file:
        return subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)


def begun(*logs: Path, trials: int = 1) -> tuple[int, Path]:
    """Wait until one of the workers has begun so many trials; the number of the last, and the worker's log."""
    for _ in range(600):
        for log in logs:
            lines = log.read_text().splitlines() if log.exists() else []
            if len(lines) >= trials:
                return int(lines[trials - 1]), log
        time.sleep(0.05)
    raise AssertionError(f"nothing happened: {[log.read_text() for log in logs]}")


def new_study(storage: StudyStorage, name: str = "s") -> optuna.Study:
    return optuna.create_study(storage=storage.storage, study_name=name, load_if_exists=True)


def completed(trials: list[optuna.trial.FrozenTrial]) -> dict[int, int]:
    return Counter(trial.params["x"] for trial in trials if trial.state == TrialState.COMPLETE)


Page = Callable[..., int]


def dashboard(url: str) -> Page:
    """The real one: page("DELETE", "/api/studies/1", key=value …) → status."""
    app = pytest.importorskip("optuna_dashboard").wsgi(url)

    def page(method: str, path: str, **content: Any) -> int:
        body, status = json.dumps(content).encode(), []
        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "CONTENT_TYPE": "application/json",
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": io.StringIO(),
        }
        list(app(environ, lambda answer, *_: status.append(int(answer.split()[0]))))
        return status[0]

    return page


def check_that_three_workers_do_all_though_one_is_killed(url: str, folder: Path) -> None:
    logs = [folder / f"{number}.log" for number in range(3)]
    workers = {log: worker(url, log, seconds=1.0) for log in logs}
    lost, victim = begun(*logs)  # a worker that starts late may find nothing left to begin
    workers[victim].kill()
    for log, process in workers.items():
        process.wait(60)
        assert process.returncode == (-signal.SIGKILL if log is victim else 0), log.read_text()
    with open_storage(url) as storage:
        trials = new_study(storage, STUDY).trials
    assert completed(trials) == dict.fromkeys(range(POINTS), 1)
    assert trials[lost].state == TrialState.FAIL and "surplus" not in trials[lost].user_attrs
    heirs = [trial for trial in trials if lost in trial.system_attrs.get("retry_history", [])]
    assert [heir.params for heir in heirs if heir.state == TrialState.COMPLETE] == [trials[lost].params]
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING}


def test_three_workers_on_a_journal_do_all_though_one_is_killed(tmp_path: Path) -> None:
    check_that_three_workers_do_all_though_one_is_killed("optuna.journal", tmp_path)


def test_three_workers_on_postgresql_do_all_though_one_is_killed(server: postgres.Server, tmp_path: Path) -> None:
    server.sql("CREATE DATABASE workers")  # whose tables the three make at the same moment
    check_that_three_workers_do_all_though_one_is_killed(server.text(database="workers"), tmp_path)


def test_sqlite_is_for_one_process_and_goes_on_at_once_when_that_is_killed(tmp_path: Path) -> None:
    url, log = "sqlite:///optuna.db", tmp_path / "first.log"
    first = worker(url, log, points=3)
    lost, _ = begun(log, trials=2)
    with pytest.raises(UserError) as refused, open_storage(url):
        pass
    assert f"{tmp_path}/optuna.db is being written by process {first.pid} on this machine" in str(refused.value)
    assert "--optuna_cfg.storage optuna.journal" in str(refused.value) and "postgresql://" in str(refused.value)
    first.kill()
    first.wait()
    page = dashboard(url)
    assert (page("GET", "/api/studies/1"), page("DELETE", "/api/studies/1")) == (200, 500)  # its guard still stands
    second = worker(url, tmp_path / "second.log", points=3)
    assert begun(tmp_path / "second.log")[0] == lost + 1
    assert second.wait(60) == 0
    with open_storage(url) as storage:
        trials = new_study(storage, STUDY).trials
    assert completed(trials) == {0: 1, 1: 1, 2: 1}
    assert [trial.state for trial in trials].count(TrialState.FAIL) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.log", "optuna.db", "second.log"]
    assert page("DELETE", "/api/studies/1") == 204


def test_the_lock_of_another_machine_is_believed(tmp_path: Path) -> None:
    (tmp_path / ".optuna.db.lock").write_text(json.dumps({"pid": 7, "host": "elsewhere", "began": "then"}))
    with (
        pytest.raises(UserError, match=r"process 7 on elsewhere.*delete .*\.optuna\.db\.lock"),
        open_storage("sqlite:///optuna.db"),
    ):
        pass


HARM: list[tuple[str, str, dict[str, Any]]] = [
    ("DELETE", "/api/studies/1", {}),
    ("POST", "/api/studies/1/rename", {"study_name": "other"}),
    ("POST", "/api/trials/1/tell", {"state": "fail"}),
    ("POST", "/api/trials/1/tell", {"state": "complete", "values": [99.0]}),
    ("POST", "/api/trials/1/user-attrs", {"user_attrs": {"reason": "mine", "surplus": True}}),
    ("POST", "/api/studies/1/1/skip", {}),
    ("POST", "/api/studies", {"study_name": "new", "directions": ["maximize"]}),
]


def press_everything(page: Page, study: optuna.Study, allowed: set[int]) -> None:
    """In a trial, after which the study is to be as if nobody had."""

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        for method, path, content in HARM:
            assert page(method, path, **content) in allowed, path
        assert page("GET", "/api/studies/1") == page("GET", "/api/studies") == 200
        trial.report(x, 1)
        trial.set_user_attr("seconds", 3)
        return x

    study.optimize(objective, n_trials=1)
    (trial,) = study.trials
    assert (trial.state, trial.value, trial.user_attrs) == (TrialState.COMPLETE, trial.params["x"], {"seconds": 3})
    assert trial.intermediate_values == {1: trial.value}
    assert [known.study_name for known in optuna.get_all_study_summaries(study._storage)] == ["s"]


def test_the_dashboard_cannot_hurt_a_running_study_in_sqlite() -> None:
    with open_storage("sqlite:///optuna.db") as storage:
        study, page = new_study(storage), dashboard("sqlite:///optuna.db")
        press_everything(page, study, {400, 500})
        assert page("PUT", "/api/studies/1/note", body="a note", version=1) == 204
        assert page("PUT", "/api/studies/1/1/note", body="of the trial", version=1) == 204
        assert study._storage.get_study_system_attrs(1)["dashboard:note_str:0"] == "a note"
    assert page("POST", "/api/studies/1/rename", study_name="other") == 201  # a copy, and the first one deleted
    assert page("DELETE", "/api/studies/2") == 204
    with open_storage("sqlite:///optuna.db") as storage:
        assert storage.storage.get_all_studies() == []


def test_the_guard_names_itself_to_other_programs() -> None:
    with open_storage("sqlite:///optuna.db") as storage:
        new_study(storage)
        other = sqlite3.connect("optuna.db")
        with pytest.raises(sqlite3.OperationalError, match="only_the_running_search_may_write_here"):
            other.execute("DELETE FROM studies")
        other.execute("CREATE TABLE theirs (a)")
        other.execute("INSERT INTO theirs VALUES (1)")
        other.commit()


def test_a_write_waits_for_a_reader_that_stays() -> None:
    with open_storage("sqlite:///optuna.db") as storage:
        study = new_study(storage)
        with storage.storage.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 600_000  # milliseconds
        reader = sqlite3.connect("optuna.db", isolation_level=None, check_same_thread=False)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM studies").fetchall()
        leaves = threading.Timer(0.5, reader.execute, ["COMMIT"])
        leaves.start()
        study.set_user_attr("written", True)
        leaves.join()
        assert study.user_attrs == {"written": True}


def test_a_read_only_role_protects_a_study_on_a_server(server: postgres.Server) -> None:
    server.sql("CREATE DATABASE watched")
    server.sql("CREATE ROLE watcher LOGIN PASSWORD 'w'")
    server.sql("GRANT pg_read_all_data TO watcher")
    with open_storage(server.text(database="watched")) as storage:
        page = dashboard(server.text(database="watched", username="watcher", password="w"))
        press_everything(page, new_study(storage), {400, 500})


def test_a_copy_protects_a_study_in_a_journal() -> None:
    with open_storage("optuna.journal") as storage:
        study = new_study(storage)
        study.add_trial(optuna.create_trial(value=1.0))
        shutil.copy("optuna.journal", "copy.journal")
        page = dashboard("copy.journal")
        assert (page("GET", "/api/studies/0"), page("DELETE", "/api/studies/0")) == (200, 204)
        assert len(study.trials) == 1


@pytest.mark.parametrize("kind", ["journal", "server"])
def test_a_study_that_is_deleted_during_a_search_is_told(kind: str, request: pytest.FixtureRequest) -> None:
    url = "optuna.journal" if kind == "journal" else request.getfixturevalue("server").text()
    with open_storage(url) as storage, open_storage(url) as other:
        study = new_study(storage, "deleted")

        def objective(trial: optuna.Trial) -> float:
            optuna.delete_study(study_name="deleted", storage=other.storage)
            return 1.0

        with pytest.raises(UserError, match="the study deleted was deleted or renamed"), storage.explained(study):
            study.optimize(objective, n_trials=1)
            storage.fail_dead(study)
        with pytest.raises(KeyError, match="of the search"), storage.explained(new_study(storage, "deleted")):
            raise KeyError("of the search")


def test_a_server_that_goes_away_is_told(server: postgres.Server) -> None:
    with open_storage(server.text()) as storage:
        study = new_study(storage, "interrupted")
        server.stop()
        try:
            told = pytest.raises(UserError, match=r"postgresql\+\w+://owner:\*\*\*@.* cannot be used: ")
            with told, storage.explained(study):
                study.set_user_attr("a", 1)
        finally:
            server.start()
        study.set_user_attr("a", 1)
        assert study.user_attrs == {"a": 1}


def test_a_trial_that_died_before_its_first_heartbeat_is_found(
    server: postgres.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_storage(server.text()) as storage:
        study = new_study(storage, "silent")
        storage.storage.create_new_trial(study._study_id)
        assert storage.fail_dead(study) == []
        monkeypatch.setattr(signs, "SILENCE_S", 0)
        assert storage.fail_dead(study) == [0]
        assert study.trials[0].state == TrialState.FAIL


def journal_trial(storage: StudyStorage, study: optuna.Study, lease: dict[str, Any] | None) -> int:
    trial_id = storage.storage.create_new_trial(study._study_id)
    if lease is not None:
        storage.storage.set_trial_user_attr(trial_id, "lease", lease)
    return trial_id


def test_on_its_own_machine_a_dead_process_is_seen_at_once() -> None:
    with open_storage("optuna.journal") as storage:
        study = new_study(storage)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        for pid, began in ((os.getpid(), "another time"), (child.pid, _began(child.pid))):
            lease = {"pid": pid, "began": began, "within": _process_ids(), "time": time.time()}
            journal_trial(storage, study, lease)
        assert storage.fail_dead(study) == [0]
        assert storage.fail_dead(study) == []
        child.kill()
        child.wait()
        assert storage.fail_dead(study) == [1]


@pytest.mark.parametrize(
    "within",
    [None, {"host": "elsewhere"}, {**_process_ids(), "boot": "other"}, {**_process_ids(), "numbering": "other"}],
    ids=["no lease yet", "another machine", "of the same name", "another container"],
)
def test_where_it_cannot_be_seen_silence_is_taken_for_death(
    within: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signs, "SILENCE_S", 0.3)
    lease = within and {"pid": 2**22 + 1, "began": "then", "within": within, "time": 0.0}
    with open_storage("optuna.journal") as storage:
        study = new_study(storage)
        trial = journal_trial(storage, study, lease)
        assert storage.fail_dead(study) == []
        time.sleep(0.4)
        if lease:  # its clock may say what it likes: it is the change that counts
            storage.storage.set_trial_user_attr(trial, "lease", {**lease, "time": -5.0})
            assert storage.fail_dead(study) == []
            time.sleep(0.4)
        assert storage.fail_dead(study) == [0]


def test_the_lease_says_who_runs_a_trial_and_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "EVERY_S", 0.1)
    with open_storage("optuna.journal") as storage:
        study, times = new_study(storage), set()

        def objective(trial: optuna.Trial) -> float:
            with storage.alive(trial):
                for _ in range(4):
                    lease = study.trials[0].user_attrs["lease"]
                    assert (lease["pid"], lease["host"]) == (os.getpid(), socket.gethostname())
                    times.add(lease["time"])
                    assert storage.fail_dead(study) == []
                    time.sleep(0.2)
            return 1.0

        study.optimize(objective, n_trials=1)
        assert len(times) == 4 and abs(max(times) - time.time()) < 60
        assert not any("_renew" in thread.name for thread in threading.enumerate())


def test_a_trial_whose_end_could_not_be_written_is_not_waited_for() -> None:
    for url in ("optuna.journal", "sqlite:///optuna.db"):
        with open_storage(url) as storage:
            study = new_study(storage)
            trial = study.ask()
            with storage.alive(trial):
                assert storage.fail_dead(study) == []
            assert storage.fail_dead(study) == [0]


def test_a_lost_point_is_tried_again_with_what_it_was_to_be() -> None:
    with open_storage("optuna.journal") as storage:
        study = new_study(storage)
        study.enqueue_trial({"x": 0.25})
        lost = study.ask()
        lost.suggest_float("x", 0, 1)
        lost.suggest_categorical("y", ["a", "b"])
        lost.set_user_attr("seconds", 9)
        lost.report(0.5, 1)
        for name, value in {"grid_id": 4, "search_space": {"x": [1]}, "cma:n_eval": 3}.items():
            storage.storage.set_trial_system_attr(lost._trial_id, name, value)
        study.tell(lost, state=TrialState.FAIL)
        assert requeue_lost(study) == [0]
        assert requeue_lost(study) == []
        heir = study.trials[1]
        assert (heir.state, heir.params) == (TrialState.WAITING, study.trials[0].params)
        assert (heir.user_attrs, heir.intermediate_values) == ({}, {})
        assert heir.system_attrs == {
            "fixed_params": {"x": 0.25},
            "grid_id": 4,
            "search_space": {"x": [1]},
            "failed_trial": 0,
            "retry_history": [0],
        }
        again = study.ask()
        assert (again.number, again.suggest_float("x", 0, 1)) == (1, 0.25)
        study.tell(again, state=TrialState.FAIL)
        assert requeue_lost(study) == [1]
        assert study.trials[2].system_attrs["retry_history"] == [0, 1]
        study.tell(study.ask(), state=TrialState.FAIL)
        assert requeue_lost(study) == []  # three have died of it


def write(name: str, content: bytes) -> None:
    Path(name).write_bytes(content)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///nowhere/optuna.db", r"the folder .*/nowhere of optuna\.db is not there; make it"),
        ("sqlite:////proc/optuna.db", r"nothing can be written beside /proc/optuna\.db"),
        ("sqlite:///a.journal", r"a\.journal cannot be used: file is not a database; if it is a journal file, give"),
        ("sqlite:///other.db", r"other\.db is a database of another program \(with a table bookmarks\)"),
        ("sqlite:///.", "cannot be used: unable to open database file"),
        ("sqlite://", r"give the path of a file behind sqlite:///, as in sqlite:///optuna\.db"),
        ("sqlite:///:memory:", "give the path of a file"),
        ("nowhere/optuna.journal", r"the folder .*/nowhere of optuna\.journal is not there; make it"),
        ("/proc/optuna.journal", r"the journal file /proc/optuna\.journal cannot be used: "),
        (".", "cannot be used: Is a directory"),
        ("other.db", r"other\.db is an SQLite database; write sqlite:///other\.db"),
        ("notes.txt", r"notes\.txt is no whole journal of Optuna's .*give another file"),
        ("torn.journal", r"torn\.journal is no whole journal of Optuna's .*give another file"),
        ("sqlite:/optuna.db", r"a database's URL has :// behind its first word, as in sqlite:///optuna\.db"),
        ("mongo://u:geheim@h", "begins with mongo://, which is no database known here"),
        ("postgres://u:geheim@h/d", "begins with postgres://.*; write postgresql://"),
        ("postgresql://u:gehe@im@h/d", "is no URL of a database.*in a password, write @ as %40"),
        ("postgresql://u:geheim@h:port/d", "is no URL of a database"),
        ("mysql://u:geheim@h/d", r'mysql://u:\*\*\*@h/d needs .* MySQLdb: pip install "mysqlclient" \(or .*pymysql'),
        ("postgresql+pg8000://u:geheim@h/d", r'needs the Python package pg8000: pip install "pg8000"'),
    ],
)
def test_what_cannot_be_used_is_told(url: str, message: str) -> None:
    write("a.journal", b'{"op_code": 0}\n')
    write("notes.txt", b"what I\nthought of")
    write(
        "torn.journal",
        b'{"op_code":0,"worker_id":"a","study_name":"s","directions":[1]}\n{"op_co{"op_code":1}\n{"op_code":1}\n',
    )
    with sqlite3.connect("other.db") as other:
        other.execute("CREATE TABLE bookmarks (a)")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(UserError, match=message) as told, open_storage(url):
        pass
    assert str(told.value).startswith("optuna_cfg.storage") and "geheim" not in str(told.value)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_a_schema_of_another_optuna_is_told() -> None:
    with open_storage("sqlite:///optuna.db"):
        pass
    with sqlite3.connect("optuna.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
        connection.execute("UPDATE version_info SET library_version = '2.6.0'")
    with (
        pytest.raises(UserError, match=r"set up by optuna 2\.6\.0.*storage upgrade"),
        open_storage("sqlite:///optuna.db"),
    ):
        pass
    assert not Path(".optuna.db.lock").exists()


@pytest.mark.parametrize("change", [{"password": "geheim"}, {"database": "nothere"}], ids=["password", "database"])
def test_what_a_server_refuses_is_told_without_the_password(server: postgres.Server, change: dict[str, str]) -> None:
    refused = pytest.raises(UserError, match=r"://owner:\*\*\*@.* cannot be used: .*FATAL: ")
    with refused as told, open_storage(server.text(**change)):
        pass
    assert "geheim" not in str(told.value) and postgres.PASSWORD not in str(told.value)
    assert "%7B" not in str(told.value)


def test_an_unreachable_server_is_told() -> None:
    driver = pytest.importorskip("psycopg").__name__
    refused = pytest.raises(UserError, match=r"u:\*\*\*@127\.0\.0\.1:1/d cannot be used: .*refused")
    with refused as told, open_storage(f"postgresql+{driver}://u:geheim@127.0.0.1:1/d"):
        pass
    assert "geheim" not in str(told.value)


def test_names_with_braces_and_blanks(tmp_path: Path) -> None:
    with open_storage("sqlite:///{a} ü'\".db") as storage:
        new_study(storage)
    assert [path.name for path in tmp_path.iterdir()] == ["{a} ü'\".db"]


def test_half_a_line_at_the_end_of_a_journal_is_no_harm() -> None:
    with open_storage("optuna.journal") as storage:
        new_study(storage).add_trial(optuna.create_trial(value=1.0))
    whole = Path("optuna.journal").read_bytes()
    write("optuna.journal", whole + b'{"op_code":4,"worker')
    with open_storage("optuna.journal") as storage:
        new_study(storage).add_trial(optuna.create_trial(value=2.0))
    assert Path("optuna.journal").read_bytes().startswith(whole)
    again = optuna.storages.JournalStorage(JournalFileBackend("optuna.journal"))
    assert [trial.value for trial in optuna.load_study(study_name="s", storage=again).trials] == [1.0, 2.0]


def test_what_is_shown_has_no_password(server: postgres.Server) -> None:
    with open_storage(server.text()) as storage:
        assert storage.shared and "owner:***@" in storage.shown and postgres.PASSWORD not in storage.shown
    for url, shared in (("optuna.journal", True), ("sqlite:///optuna.db", False)):
        with open_storage(url) as storage:
            assert (storage.shown, storage.shared) == (url, shared)


def test_a_journal_that_is_taken_away_is_told() -> None:
    with open_storage("optuna.journal") as storage:
        study = new_study(storage)
        Path("optuna.journal").unlink()
        told = pytest.raises(UserError, match=r"optuna\.journal cannot be used: .*No such file")
        with told, storage.explained(study):
            study.get_trials()
