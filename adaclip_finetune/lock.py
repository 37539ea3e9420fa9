"""One run to a folder: a lock file that names who writes there, and which a dead run does not hold."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from adaclip_finetune.errors import UserError


class FolderLock:
    """Held from `take` to `release`. The file tells process id, host and when that process began."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock.json"

    def take(self) -> None:
        """Raises UserError if a living run, or one on another machine, holds the folder."""
        while True:
            try:
                self._create()
                return
            except FileExistsError:
                self._clear_away_the_dead()

    def release(self) -> None:
        """Let the next one in."""
        with suppress(FileNotFoundError):
            if _read(self.path) == _myself():
                self.path.unlink()

    def _create(self) -> None:
        """Raises FileExistsError where there is one: the first comes first."""
        mine = self.path.with_name(f".lock-{socket.gethostname()}-{os.getpid()}")
        mine.write_text(json.dumps(_myself()), encoding="utf-8")
        try:
            os.link(mine, self.path)  # whole at once, where the file system has links
        except FileExistsError:
            raise
        except OSError:
            with self.path.open("x", encoding="utf-8") as file:
                json.dump(_myself(), file)
        finally:
            mine.unlink()

    def _clear_away_the_dead(self) -> None:
        owner = _read(self.path)
        if owner is None:  # released this very moment
            return
        if owner["host"] != socket.gethostname():
            raise UserError(
                f"{self.path.parent} is being written by process {owner['pid']} on {owner['host']}; whether that still "
                f"runs cannot be told from here. If it does not, delete {self.path}"
            )
        if _alive(owner):
            raise UserError(
                f"{self.path.parent} is being written by process {owner['pid']} on this machine: wait for it, or stop "
                "it"
            )
        stale = self.path.with_name(f".stale-{socket.gethostname()}-{os.getpid()}")
        with suppress(FileNotFoundError):  # another one was quicker
            self.path.rename(stale)
            if _read(stale) == owner:
                stale.unlink()
            else:  # between reading and renaming, another one took the dead one's place: it was first
                stale.rename(self.path)


def _myself() -> dict[str, Any]:
    # A process id alone comes back, in containers within the minute.
    return {"pid": os.getpid(), "host": socket.gethostname(), "began": _began(os.getpid())}


def _alive(owner: dict[str, Any]) -> bool:
    try:
        return bool(_began(owner["pid"]) == owner["began"])
    except psutil.NoSuchProcess:
        return False


def _began(pid: int) -> str:
    """When a process began, on a clock that nobody sets. Raises psutil.NoSuchProcess."""
    try:
        # Linux: the boot, and the ticks since then (field 22 of proc(5), counted behind the command's name).
        ticks = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()}+{ticks}"
    except OSError:
        return str(psutil.Process(pid).create_time())


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        owner = {name: content[name] for name in ("pid", "host", "began")}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no lock of a run; if nothing writes into this folder, delete it") from error
    return owner
