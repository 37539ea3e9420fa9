"""Lock files: one owner at a time, and none that is dead."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import FolderLock, Lock, is_alive, this_process


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("of_a_file", [False, True])
def test_a_second_owner_is_refused_until_the_first_releases(of_a_file: bool, tmp_path: Path) -> None:
    guarded = tmp_path / "optuna.db" if of_a_file else tmp_path
    first, second = (Lock(tmp_path / ".lock", guarded) if of_a_file else FolderLock(tmp_path) for _ in range(2))
    first.take()
    with pytest.raises(UserError, match=rf"{guarded} is locked by process {os.getpid()} on this machine"):
        second.take()
    second.release()
    assert names(tmp_path), "only the owner releases"
    first.release()
    second.take()
    second.release()
    assert not names(tmp_path)


@pytest.mark.parametrize("dead", [{"began": 1.0}, {"pid": 2**22 + 1}], ids=["its id was given again", "no process"])
def test_the_lock_of_a_dead_process_is_taken_over(dead: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text(json.dumps(this_process() | dead))
    FolderLock(tmp_path).take()
    assert json.loads((tmp_path / "lock.json").read_text()) == this_process()
    assert names(tmp_path) == ["lock.json"]


def test_a_process_of_another_machine_counts_as_alive(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text(json.dumps({"pid": 7, "host": "elsewhere", "began": 1.0}))
    with pytest.raises(UserError, match=r"by process 7 on elsewhere.*delete .*lock\.json"):
        FolderLock(tmp_path).take()
    FolderLock(tmp_path).release()
    assert names(tmp_path) == ["lock.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1, "host": "here", "began": "then"}'])
def test_a_file_that_names_no_process_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text(content)
    with pytest.raises(UserError, match=r"lock\.json.* delete it"):
        FolderLock(tmp_path).take()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        FolderLock(tmp_path).take()
    assert not names(tmp_path)
    monkeypatch.undo()
    FolderLock(tmp_path).take()
    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(UserError, match="is locked by process"):
        FolderLock(tmp_path).take()
    assert json.loads((tmp_path / "lock.json").read_text())["host"] == socket.gethostname()


def test_a_killed_process_is_dead_even_if_its_parent_has_not_collected_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = {**this_process(), "pid": child.pid, "began": psutil.Process(child.pid).create_time()}
    assert is_alive(owner) and is_alive(this_process())
    assert not is_alive({**this_process(), "began": owner["began"] - 3600})
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and left a zombie
    assert not is_alive(owner)
    child.wait()
