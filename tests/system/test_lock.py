"""Lock files: one owner at a time, and none that is dead."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import FolderLock, is_alive, this_process


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_second_owner_is_refused_until_the_first_releases(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    with pytest.raises(UserError, match=rf"{tmp_path} is locked by process {os.getpid()} on .*wait for it"):
        second.take()
    second.release()
    assert names(tmp_path) == ["lock.json"], "only the owner releases"
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


@pytest.mark.parametrize(("content", "told"), [
    ('{"pid": 7, "host": "elsewhere", "began": 1.0}', r"by process 7 on elsewhere"),
    ("", "an unknown process"),
    ('{"pid": 1, "host": "here", "began": "then"}', "by process 1 on here"),
])  # fmt: skip
def test_a_lock_whose_owner_cannot_be_asked_stays(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text(content)
    with pytest.raises(UserError, match=rf"{told}.*delete .*lock\.json"):
        FolderLock(tmp_path).take()
    assert (tmp_path / "lock.json").read_text() == content


def test_a_killed_process_is_dead_even_if_its_parent_has_not_collected_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = {**this_process(), "pid": child.pid, "began": psutil.Process(child.pid).create_time()}
    assert is_alive(owner) and is_alive(this_process())
    assert not is_alive({**this_process(), "began": owner["began"] - 3600})
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and left a zombie
    assert not is_alive(owner)
    child.wait()
