"""A private PostgreSQL server for tests, on a Unix socket in a temporary folder, if PostgreSQL is installed."""

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import URL

PASSWORD = "a{b}:c@d/e%f"


class Server:
    """A server: its folder, the account that runs it, and the URL of its owner."""

    def __init__(self, programs: Path, folder: Path, driver: str, account: dict[str, Any]) -> None:
        self.programs, self.folder, self.account = programs, folder, account
        self.url = URL.create(
            f"postgresql+{driver}", "owner", PASSWORD, database="postgres", query={"host": str(folder)}
        )
        self.process: subprocess.Popen[bytes] | None = None

    def text(self, **changes: Any) -> str:
        """Return the URL with some parts replaced."""
        return self.url.set(**changes).render_as_string(hide_password=False)

    def start(self) -> None:
        command = [self.programs / "postgres", "-D", self.folder / "data", "-k", self.folder]
        options = ["-c", "listen_addresses=", "-c", "fsync=off"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([*command, *options], stdout=log, stderr=log, **self.account)
        for _ in range(300):
            if subprocess.run([self.programs / "pg_isready", "-q", "-h", self.folder]).returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(2)  # fast shutdown
        self.process.wait(30)

    def sql(self, words: str) -> None:
        """Run a statement as the owner."""
        done = subprocess.run(
            [self.programs / "psql", "-h", self.folder, "-U", "owner", "-d", "postgres", "-c", words],
            env={**os.environ, "PGPASSWORD": PASSWORD},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


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
        (folder / "password").write_text(PASSWORD)
        if account:
            shutil.chown(folder, "postgres")
            shutil.chown(folder / "password", "postgres")
        server = Server(Path(program).resolve().parent, folder, driver, account)
        options = ["-U", "owner", "-A", "scram-sha-256", "--pwfile", folder / "password", "--no-sync", "--locale=C"]
        command = [program, "-D", folder / "data", "-E", "UTF8", *options]
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True, **account)
        assert made.returncode == 0, made.stderr
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)
