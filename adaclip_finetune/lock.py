"""One run to a folder or a file: a lock file that names who writes there, and which a dead run does not hold."""

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
    """Held from `take` to `release`. The file at `path` tells process id, host and when that process began; `guarded`
    is what only its holder may write."""

    def __init__(self, path: Path, guarded: Path) -> None:
        self.path, self._guarded = path, guarded

    def take(self) -> None:
        """Raises UserError if a living process, or one on another machine, holds it; OSError if there is no room."""
        while True:
            try:
                self._create()
                return
            except FileExistsError:
                self._clear_away_the_dead()

    def release(self) -> None:
        """Let the next one in."""
        with suppress(FileNotFoundError):
            if _read(self.path) == this_process():
                self.path.unlink()

    def _create(self) -> None:
        """Raises FileExistsError where there is one: the first comes first. OSError leaves nothing behind."""
        mine = self.path.with_name(f".lock-{socket.gethostname()}-{os.getpid()}")
        try:
            mine.write_text(json.dumps(this_process()), encoding="utf-8")
            os.link(mine, self.path)  # whole at once, where the file system has links
        except FileExistsError:
            raise
        except OSError:
            self._create_without_links()
        finally:
            mine.unlink(missing_ok=True)

    def _create_without_links(self) -> None:
        file = self.path.open("x", encoding="utf-8")
        try:
            with file:
                json.dump(this_process(), file)
        except OSError:  # a full disk leaves it without its content, which nobody could read
            self.path.unlink(missing_ok=True)
            raise

    def _clear_away_the_dead(self) -> None:
        owner = _read(self.path)
        if owner is None:  # released this very moment
            return
        if owner["host"] != socket.gethostname():
            raise UserError(
                f"{self._guarded} is being written by process {owner['pid']} on {owner['host']}; whether that still "
                f"runs cannot be told from here. If it does not, delete {self.path}"
            )
        if is_alive(owner):
            raise UserError(
                f"{self._guarded} is being written by process {owner['pid']} on this machine: wait for it, or stop it"
            )
        stale = self.path.with_name(f".stale-{socket.gethostname()}-{os.getpid()}")
        with suppress(FileNotFoundError):  # another one was quicker
            self.path.rename(stale)
            if _read(stale) == owner:
                stale.unlink()
            else:  # between reading and renaming, another one took the dead one's place: it was first
                stale.rename(self.path)


class FolderLock(Lock):
    """A folder's, in its lock.json."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "lock.json", folder)


def this_process() -> dict[str, Any]:
    """Who we are, to be told to others in JSON."""
    # A process id alone comes back, in containers within the minute.
    return {"pid": os.getpid(), "host": socket.gethostname(), "began": _began(os.getpid())}


def is_alive(owner: dict[str, Any]) -> bool:
    """Whether the process of this machine that said so of itself still runs."""
    try:
        return bool(_began(owner["pid"]) == owner["began"])
    except psutil.NoSuchProcess:
        return False


def _began(pid: int) -> str:
    """When a process began, on a clock that nobody sets. Raises psutil.NoSuchProcess."""
    try:
        # Linux: the boot, and the ticks since then (field 22 of proc(5), counted behind the command's name).
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return str(psutil.Process(pid).create_time())
    if fields[0] in "ZX":  # killed, and its parent does not look; in containers it may never do
        raise psutil.ZombieProcess(pid)
    return f"{boot}+{fields[19]}"


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds it; None where nobody does. Raises UserError for what is no lock."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        owner = {name: content[name] for name in ("pid", "host", "began")}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no lock of a run; if no run is going on there, delete it") from error
    return owner
