"""A real PostgreSQL of a test's own: a cluster in a temporary folder, on a free port, ended by its process id."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from support.process import Process, free_port, until
from support.small_disk import SmallDisk

PASSWORD = "the password of a test"
USER = "corral"


def programs() -> Path:
    """The folder of PostgreSQL's programs, the newest version's; the test fails where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    if on_path := shutil.which("initdb"):
        return Path(on_path).resolve().parent
    pytest.fail("there is no PostgreSQL: run scripts/install-postgresql first (scripts/test does)", pytrace=False)


DATA, TABLES = "data", "tables"
"""What may lie on a small disk: all that it writes, or the tablespace of new databases alone."""


class Postgres:
    """A cluster. ``start``, ``kill`` and ``stop`` may be called in turns; it comes back on its port with its data.

    ``disk`` is the small disk that it was made on, None where there is none.
    """

    def __init__(self, small: str = "", size: str = "") -> None:
        """`small`: what lies on a disk of that size of its own, `DATA` or `TABLES`; only root can have it so.

        Its log has segments of 1 MiB then, and it does not start itself again where it has crashed.
        """
        self._bin = programs()
        # Not below pytest's folder, which is closed to the user that PostgreSQL runs as: it refuses to be root.
        self.folder = Path(tempfile.mkdtemp(prefix="corral-postgres-"))
        self.port = free_port()
        self._process: Process | None = None
        self._user = "postgres" if os.getuid() == 0 else ""
        if self._user:
            shutil.chown(self.folder, self._user, self._user)
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        if self._user:
            shutil.chown(secret, self._user)
        self.small = small
        self.disk = SmallDisk(self.folder / small, size, self._user) if small else None
        argv = [*self._as_user(), str(self._bin / "initdb"), "--pgdata", str(self.folder / "data"), "--no-sync"]
        argv += ["--username", USER, "--pwfile", str(secret), "--auth", "scram-sha-256", "--encoding", "UTF8"]
        argv += ["--locale", "C.UTF-8", *(["--wal-segsize", "1"] if small else [])]
        subprocess.run(argv, check=True, capture_output=True, cwd="/")

    def _as_user(self) -> list[str]:
        if not self._user:
            return []
        # What is told to die with its parent forgets it when its user changes: so in the same step.
        groups = ["--clear-groups", "--pdeathsig", "QUIT"]
        seen = self.disk.seen if self.disk is not None else []
        return [*seen, "setpriv", "--reuid", self._user, "--regid", self._user, *groups]

    def start(self) -> None:
        """Start it, and wait until it answers."""
        argv = [*self._as_user(), self._bin / "postgres", "-D", self.folder / "data", "-p", str(self.port)]
        argv += ["-k", self.folder, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=50"]
        argv += ["-c", "restart_after_crash=off"] if self.small else []
        self._process = Process(argv, self.folder / "postgres.log")
        self._process.wait_until(self._answers)

    @property
    def alive(self) -> bool:
        """Whether its first process runs."""
        return self._process is not None and self._process.alive

    def kill(self) -> None:
        """End it as a crash would."""
        self._end(signal.SIGQUIT)

    def kill_each(self) -> None:
        """kill -9 of each of its processes."""
        for pid in self._halted():
            os.kill(pid, signal.SIGKILL)
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in order."""
        self._end(signal.SIGINT)

    def hold(self, on: bool) -> None:
        """Stop every one of its processes, or let them go on."""
        for pid in self._halted():
            os.kill(pid, signal.SIGSTOP if on else signal.SIGCONT)
        if not on:
            self._signal(signal.SIGCONT)

    def _halted(self) -> list[int]:
        """Its processes but the first, which stands still: it begins no other, and they are there though they end."""
        first = self._signal(signal.SIGSTOP)
        stat = Path(f"/proc/{first}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "its first process stands still")
        return [int(pid) for pid in Path(f"/proc/{first}/task/{first}/children").read_text().split()]

    def _signal(self, number: int) -> int:
        """Send its first process a signal; its pid."""
        assert self._process is not None
        self._process.send(number)
        return self._process.pid

    def remove(self) -> None:
        self.stop()
        if self.disk is not None:
            self.disk.close()
        shutil.rmtree(self.folder)

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{secrets.token_hex(6)}"
        where = ""
        if self.small == TABLES:
            if not self.execute(f"SELECT 1 FROM pg_tablespace WHERE spcname = '{TABLES}'"):
                self.execute(f"CREATE TABLESPACE {TABLES} LOCATION '{self.folder / TABLES}'")
            where = f" TABLESPACE {TABLES}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE template0{where}")
        return self.url(name)

    def url(self, name: str, password: str | None = PASSWORD) -> str:
        secret = "" if password is None else ":" + password.replace(" ", "%20")
        return f"postgresql://{USER}{secret}@127.0.0.1:{self.port}/{name}"

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Run a statement; its rows."""
        with self.connect(database) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def connect(self, database: str) -> psycopg.Connection[tuple[object, ...]]:
        """A session of its own; each statement is a transaction."""
        address = {"host": "127.0.0.1", "port": self.port, "user": USER, "dbname": database}
        return psycopg.connect(**address, password=PASSWORD, autocommit=True, connect_timeout=30)

    def _answers(self) -> bool:
        try:
            self.connect("postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.end(number)
            self._process = None


@contextmanager
def postgres(small: str = "", size: str = "") -> Iterator[Postgres]:
    """A cluster that runs, and is gone afterwards; `small` and `size` as `Postgres` takes them."""
    made = Postgres(small, size)
    try:
        made.start()
        yield made
    finally:
        made.remove()


def name_of(url: str) -> str:
    """The database's name in a URL."""
    match = re.search(r"/(\w+)$", url)
    assert match is not None
    return match[1]
