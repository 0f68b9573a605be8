"""A whole stack: `corral up --detach`, then `corral down`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from corral.stack.state import StateFolder
from support.metrics import page
from support.process import free_port, until
from support.servers import REPOSITORY, python_env


@dataclass(frozen=True)
class Stack:
    """A stack that runs. ``key`` may infer, ``admin_key`` may administer."""

    url: str
    key: str
    admin_key: str
    state: Path

    def corral(self, *arguments: str, timeout: float = 240.0) -> Any:
        """Run a command with --json against this stack; what it prints."""
        return json.loads(corral(*arguments, "--json", "--state", str(self.state), timeout=timeout))

    def admin(self, path: str, **query: str | int) -> Any:
        """What the admin API answers to a GET, without the start of a process: for what is asked again and again."""
        headers = {"Authorization": f"Bearer {self.admin_key}"}
        answer = httpx.get(f"{self.url}/admin/{path}", params=query, headers=headers, timeout=30, trust_env=False)
        return answer.raise_for_status().json()

    def listed(self, what: str, **query: str | int) -> list[dict[str, Any]]:
        """The rows of a list of the admin API, as `corral WHAT list` has them."""
        rows: list[dict[str, Any]] = self.admin(what, **query)[what]
        return rows

    def headers(self) -> dict[str, str]:
        """The inference key as a header."""
        return {"Authorization": f"Bearer {self.key}"}

    def sum_of(self, name: str) -> float:
        """A metric, of all gateways together."""
        parts = StateFolder(self.state).stack() or {}
        return sum(page(gateway["metrics"]).value(name) for gateway in parts["gateways"])

    def until_continued(self, *models: str, seconds: float = 120.0) -> None:
        """Wait until control has tried the models (all there are), each passed, and every gateway knows.

        It tries one after the other: some twenty seconds where the machine is idle.
        """

        def passed() -> bool:
            listed = {model["name"]: model["continuation"] for model in self.listed("models")}
            return {listed.get(name) for name in models or listed} == {"passed"}

        def known() -> bool:
            return all(gateway["current"] for gateway in self.admin("status")["gateways"])

        until(passed, "control has tried the models", seconds, every=0.3)
        until(known, "the gateways have heard of it")


def corral(*arguments: str, timeout: float = 240.0) -> str:
    """Standard output of a `corral` command; AssertionError with its words where it fails."""
    # What the operator of this machine has set for a stack of their own must not steer a test's.
    env = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
    done = subprocess.run(
        [sys.executable, "-m", "corral", *arguments],
        cwd=REPOSITORY,
        env={**env, **python_env()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"corral {' '.join(arguments)}: status {done.returncode}\n{done.stderr}\n{done.stdout}"
    return done.stdout


@contextmanager
def stack(state: Path, *arguments: str) -> Iterator[Stack]:
    """`corral up --detach` with ``arguments`` on a free port and the state folder ``state``."""
    port = free_port()
    where = ["--state", str(state)]
    made = json.loads(corral("up", "--detach", "--json", "--port", str(port), *where, *arguments, timeout=240))
    try:
        admin_key = (state / "admin.key").read_text().strip()
        yield Stack(made["url"].rstrip("/"), made["key"], admin_key, state)
    finally:
        corral("down", *where)
