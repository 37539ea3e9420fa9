"""Files that are written whole or not at all, with the permissions of the user."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaclip_finetune.durable import replacing, write_durably


@pytest.fixture
def umask() -> Iterator[int]:
    """Set an unusual umask for the test."""
    previous = os.umask(0o027)
    yield 0o027
    os.umask(previous)


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_replaced_and_has_the_users_permissions(shared: bool, umask: int, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"old", b"new"):
        write_durably(path, content, shared)
        assert path.read_bytes() == content
    with replacing(path, shared) as part:  # as safetensors does, which creates private files
        part.write_bytes(b"tensors")
        part.chmod(0o600)
    assert path.read_bytes() == b"tensors"
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_durably(path, b"old")
    with pytest.raises(type(error)), replacing(path) as part:
        part.write_bytes(b"half of the n")
        raise error
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
