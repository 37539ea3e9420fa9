"""A private PostgreSQL server for tests, on a Unix socket in a temporary folder, if PostgreSQL is installed."""

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import URL

PASSWORD = "a{b}:c@d/e%f"


class Server:
    """A server whose files are in `folder`; `url` is that of its owner."""

    def __init__(self, programs: Path, folder: Path, driver: str, account: dict[str, Any]) -> None:
        self._programs, self._folder, self._account = programs, folder, account
        where = {"host": str(folder)}
        url = URL.create(f"postgresql+{driver}", "owner", PASSWORD, database="postgres", query=where)
        self.url = url.render_as_string(hide_password=False)

    def create(self) -> None:
        (self._folder / "password").write_text(PASSWORD)
        if self._account:
            shutil.chown(self._folder, "postgres")
            shutil.chown(self._folder / "password", "postgres")
        options = ["-U", "owner", "-A", "scram-sha-256", "--pwfile", self._folder / "password", "--no-sync"]
        self._run("initdb", "-E", "UTF8", "--locale=C", *options)

    def start(self) -> None:
        options = f"-k {self._folder} -c listen_addresses= -c fsync=off"
        self._run("pg_ctl", "start", "-w", "-l", self._folder / "log", "-o", options)

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "-w", "-m", "fast")

    def _run(self, program: str, *words: object) -> None:
        command = [self._programs / program, "-D", self._folder / "data", *map(str, words)]
        subprocess.run(command, cwd=self._folder, stdout=subprocess.DEVNULL, check=True, **self._account)


@contextmanager
def running() -> Iterator[Server]:
    """Start a server; skip the test, with the reason, if that is not possible."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    program = shutil.which("initdb") or (found[-1] if found else None)
    if program is None:
        pytest.skip("no PostgreSQL server here (Debian: apt-get install postgresql)")
    driver = next((name for name in ("psycopg", "psycopg2") if importlib.util.find_spec(name)), None)
    if driver is None:
        pytest.skip("no driver for PostgreSQL here (pip install 'psycopg[binary]')")
    account: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to be root
        try:
            entry = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and the user postgres does not exist")
        account = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    # Other users cannot enter pytest's folder, and the path of a socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    try:
        server = Server(Path(program).resolve().parent, folder, driver, account)
        server.create()
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)
