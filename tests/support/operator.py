"""Someone at a shell who works by a runbook, with a stack of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx

from support.process import free_port, until
from support.servers import python_env


class Operator:
    """Someone at a shell with `corral` on PATH, and the variables that the page has set."""

    def __init__(self, folder: Path, database: str | None = None, nodes: int = 1) -> None:
        self.folder, self.state, self.port = folder, folder / "state", free_port()
        (folder / "bin").mkdir()
        shim = folder / "bin/corral"
        up = f'[ "$1" != up ] || set -- "$@" --node-backend simulated --nodes {nodes}\n'
        shim.write_text(f'#!/bin/sh\n{up}exec {sys.executable} -P -m corral "$@"\n')
        shim.chmod(0o755)
        (folder / "passphrase").write_text("a passphrase of a test\n")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
        self.env = {
            **kept,
            **python_env(),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "CORRAL_STATE": str(self.state),
            "CORRAL_EDGE__PORT": str(self.port),
            "CORRAL_BACKUP_PASSPHRASE_FILE": str(folder / "passphrase"),
            "BACKUP": str(folder / "last.backup"),
        }
        if database is not None:
            self.env["CORRAL_STORE__DATABASE"] = database
        try:
            self.run("corral up --detach")
            made = self.run("corral keys create client --json")
            self.key = str(json.loads(made)["key"])
            until(self.works, "the gateway knows the key")
            self.run('corral backup create --output "$BACKUP"')
        except BaseException:
            self.attempt("corral down")  # nobody has an operator to end yet
            raise

    def run(self, script: str, status: int = 0) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == status, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout + (done.stderr if status else "")

    def attempt(self, script: str) -> str:
        """What it prints, "" where it fails."""
        try:
            return self.run(script)
        except AssertionError:
            return ""

    def works(self) -> bool:
        """Whether the client's key is still good."""
        headers = {"Authorization": f"Bearer {self.key}"}
        answer = httpx.get(f"http://127.0.0.1:{self.port}/api/tags", headers=headers, timeout=30, trust_env=False)
        return answer.status_code == 200

    def end(self) -> None:
        if self.state.exists():
            self.run("corral down")
