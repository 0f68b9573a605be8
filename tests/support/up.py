"""`corral up` in the foreground, as tests run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from corral.stack import guard, ports
from corral.stack.state import StateFolder, running
from support.process import free_port, until
from support.servers import REPOSITORY, python_env

BACKEND = "simulated"


class Up:
    """A `corral up` in the foreground, with simulated nodes. Its output goes to ``output``, what it says of errors to
    ``errors``, else both to `said`."""

    def __init__(
        self, state: Path, *arguments: str, port: int = 0, output: int | None = None, errors: int | None = None
    ) -> None:
        self.state = StateFolder(state)
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        state.parent.mkdir(parents=True, exist_ok=True)
        self._said = state.parent / f"{state.name}.up.{self.port}"
        argv = [sys.executable, "-P", "-m", "corral", "up", "--json", "--port", str(self.port)]
        argv += ["--node-backend", BACKEND, "--nodes", "2", "--state", str(state), *arguments]
        with self._said.open("wb") as said:
            self.process = subprocess.Popen(
                argv,
                stdout=said if output is None else output,
                stderr=said if errors is None else errors,
                stdin=subprocess.DEVNULL,
                cwd=REPOSITORY,
                env=environment(),
            )

    def ready(self) -> dict[str, object]:
        """What it printed when it was ready."""

        def said() -> bool:
            assert self.process.poll() is None, self.said
            return '"curl"' in self.said

        until(said, "the stack is ready", 240)
        return self.ready_already()

    def ready_already(self) -> dict[str, object]:
        """The same, of one that was ready."""
        printed: dict[str, object] = json.loads(self.said[self.said.index("{") :])
        return printed

    @property
    def said(self) -> str:
        return self._said.read_text()

    def stop(self, number: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(240)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")} | python_env()


def corral(*arguments: str, state: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-P", "-m", "corral", *arguments, "--state", str(state)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=240, env=environment(), cwd=REPOSITORY)


def nothing_left(state: StateFolder, known_ports: dict[str, int]) -> None:
    assert guard.left_behind(str(state.root)) == []
    assert not running(state)
    assert [name for name, port in known_ports.items() if not ports.is_free(port)] == []
    left = {path.name for path in state.run.iterdir()} & {
        "lock", "stack.json", "supervisord.pid", "supervisor.sock", "haproxy.sock", "master.sock",
    }  # fmt: skip
    assert left == set()


def pids(up: Up) -> dict[str, int]:
    seen = json.loads(corral("status", "--json", state=up.state.root).stdout)
    found = {"haproxy": seen["edge"]["pid"], "control": seen["control"]["pid"]}
    found["valkey"] = seen["store"]["valkey"]["pid"]
    return found | {item["name"]: item["pid"] for item in [*seen["gateways"], *seen["nodes"]]}
