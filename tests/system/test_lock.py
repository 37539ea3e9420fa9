"""One run to a folder or a file."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import FolderLock, Lock, _began, is_alive, this_process


def write_owner(folder: Path, **changes: object) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "began": "then", **changes}
    (folder / "lock.json").write_text(json.dumps(owner))


def test_a_second_one_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    with pytest.raises(UserError, match=f"is being written by process {os.getpid()} on this machine"):
        second.take()
    first.release()
    second.take()
    second.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "dead", [{"began": "another time"}, {"pid": 2**22 + 1}], ids=["its number was given again", "no process"]
)
def test_the_lock_of_a_dead_run_is_taken_over(dead: dict[str, object], tmp_path: Path) -> None:
    write_owner(tmp_path, **dead)
    lock = FolderLock(tmp_path)
    lock.take()
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]


def test_another_machine_is_believed(tmp_path: Path) -> None:
    write_owner(tmp_path, host="elsewhere", pid=7)
    with pytest.raises(UserError, match=r"by process 7 on elsewhere.*delete .*lock\.json"):
        FolderLock(tmp_path).take()


def test_release_leaves_the_lock_of_another(tmp_path: Path) -> None:
    write_owner(tmp_path, host="elsewhere")
    FolderLock(tmp_path).release()
    assert (tmp_path / "lock.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_what_is_no_lock(content: str, tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text(content)
    with pytest.raises(UserError, match=r"lock\.json is no lock of a run"):
        FolderLock(tmp_path).take()


def test_a_file_may_be_guarded_by_a_lock_beside_it(tmp_path: Path) -> None:
    database = tmp_path / "optuna.db"
    first, second = (Lock(tmp_path / ".optuna.db.lock", database) for _ in range(2))
    first.take()
    with pytest.raises(UserError, match=rf"{database} is being written by process {os.getpid()} on this machine"):
        second.take()
    first.release()
    assert list(tmp_path.iterdir()) == []


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files can be made, and hold nothing."""

    def full(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    def nothing(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(json, "dump", nothing)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        FolderLock(tmp_path).take()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_lock_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FolderLock(tmp_path).take()
    held = (tmp_path / "lock.json").read_text()
    full_disk(monkeypatch)
    with pytest.raises(UserError, match="is being written by process"):
        FolderLock(tmp_path).take()
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]
    assert (tmp_path / "lock.json").read_text() == held


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    lock = FolderLock(tmp_path)
    lock.take()
    assert json.loads(lock.path.read_text()) == this_process()
    with pytest.raises(UserError, match="is being written by process"):
        FolderLock(tmp_path).take()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_who_is_alive() -> None:
    assert is_alive(this_process())
    assert not is_alive({**this_process(), "began": "another time"})


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="where it is read is Linux's")
def test_a_killed_process_that_its_parent_does_not_look_after_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = {**this_process(), "pid": child.pid, "began": _began(child.pid)}
    assert is_alive(owner)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and left a zombie
    assert not is_alive(owner)
    child.wait()
