"""A gateway of a fleet whose way to Valkey a test may cut."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from support.fleet import Fleet
from support.line import Line, line
from support.process import Process, until


@contextmanager
def behind_a_line(fleet: Fleet, gateway: str) -> Iterator[Line]:
    """A gateway that reaches Valkey by a line is in the place of the supervisor's own, which is back afterwards."""
    (pid,) = [one["pid"] for one in fleet.stack.corral("status")["gateways"] if one["name"] == gateway]
    argv, environment = (Path(f"/proc/{pid}/{name}").read_text().split("\0")[:-1] for name in ("cmdline", "environ"))
    with line(int(urlsplit(fleet.valkey.url).port or 0)) as way, fleet.unsupervised():
        os.kill(pid, signal.SIGKILL)
        # The supervisor stands still and reaps nobody: what has ended has no files open any more.
        until(lambda: not list(Path(f"/proc/{pid}/fd").iterdir()), "it has ended")
        env = dict(entry.split("=", 1) for entry in environment)
        env |= {"CORRAL_STORE__VALKEY": f"redis://127.0.0.1:{way.port}/0"}
        process = Process(argv, fleet.folder / "behind-a-line.log", env)
        try:
            yield way
        finally:
            process.end(signal.SIGKILL)
