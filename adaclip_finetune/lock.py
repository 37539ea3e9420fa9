"""Lock files: one process at a time writes to a folder or a file, and a process that died holds no lock.

The lock file names its owner by process id, host and start time. Locks of the operating system would not do: data
loader processes inherit them and may outlive a run that was killed.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from adaclip_finetune.errors import UserError


class Lock:
    """A lock file at `path` that guards `guarded`, which only the owner of the lock may write."""

    def __init__(self, path: Path, guarded: Path) -> None:
        self.path, self._guarded, self._held = path, guarded, False

    def take(self) -> None:
        """Take the lock. Raise UserError if another process holds it, and OSError if the file cannot be written."""
        while not self._held:
            try:
                with self.path.open("x", encoding="utf-8") as file:
                    json.dump(this_process(), file)
                self._held = True
            except FileExistsError:
                with suppress(FileNotFoundError):  # released in the meantime
                    self._remove_if_stale()
            except OSError:  # A full disk must not leave a lock that names no owner.
                self.path.unlink(missing_ok=True)
                raise

    def release(self) -> None:
        """Release the lock, if `take` succeeded."""
        if self._held:
            self.path.unlink(missing_ok=True)
            self._held = False

    def _remove_if_stale(self) -> None:
        """Remove the lock file of a process that is gone. Raise UserError if its owner may still be running."""
        text = self.path.read_text(encoding="utf-8")
        try:
            owner = json.loads(text)
            who, here = f"process {owner['pid']} on {owner['host']}", owner["host"] == socket.gethostname()
            running = not here or is_alive(owner)
        except (ValueError, TypeError, KeyError):
            who, here, running = "an unknown process", False, True
        if running:
            way_out = "wait for it, or stop it" if here else f"if it is no longer running, delete {self.path}"
            raise UserError(f"{self._guarded} is locked by {who}: {way_out}")
        # Renaming tells which process removes the lock, if several find the owner gone at the same time.
        stale = self.path.with_name(f".stale-{socket.gethostname()}-{os.getpid()}")
        self.path.rename(stale)
        if stale.read_text(encoding="utf-8") == text:
            stale.unlink()
        else:  # Another process has taken the lock since its owner was read.
            stale.rename(self.path)


class FolderLock(Lock):
    """The lock of a folder: `lock.json` in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "lock.json", folder)


def this_process() -> dict[str, Any]:
    """Return what identifies this process: process id, host, and start time, since process ids are used again."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "began": psutil.Process().create_time()}


def is_alive(owner: dict[str, Any]) -> bool:
    """Return whether the process of this machine that `this_process` described is still running."""
    try:
        process = psutil.Process(owner["pid"])
        same = abs(process.create_time() - owner["began"]) < 2  # seconds: start times move with the system clock
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # a process of another user
        return True
