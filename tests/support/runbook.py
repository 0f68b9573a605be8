"""The shell blocks of a runbook, run as an operator would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from support.servers import REPOSITORY, python_env

PROCEDURES = ("model-deployment", "scaling", "incident-response", "maintenance", "disaster-recovery")
"""The runbooks that are no alert's."""
NOT_HERE = {
    "docker compose pull ollama-1": "a registry of images: the test has the new tag on the engine",
    "docker compose pull --ignore-buildable": "a registry of images",
    "docker compose pull postgres": "a registry of images",
    'docker compose exec ollama-2 ollama pull "$MODEL"': "Ollama's library: the test creates the model on the node",
    'docker compose exec ollama-3 ollama pull "$MODEL"': "Ollama's library: the test creates the model on the node",
}
"""Lines that need what this network has not, and what that is. Every other line of every block is run."""
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fences(name: str) -> list[tuple[str, str, str]]:
    """(heading, info string, text) of every block of docs/runbooks/NAME.md; the heading is "" before the first."""
    text = (REPOSITORY / "docs/runbooks" / f"{name}.md").read_text(encoding="utf-8")
    first, *parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    bodies = [("", first), *zip(parts[::2], parts[1::2], strict=True)]
    return [(heading, info, block) for heading, body in bodies for info, block in _FENCE.findall(body)]


def sections(name: str, kind: str = "sh") -> dict[str, list[str]]:
    """The shell blocks that can be run anywhere (or those of another kind), by the headings they stand under."""
    found: dict[str, list[str]] = {}
    for heading, info, block in fences(name):
        found.setdefault(heading, []).extend([block] if info == kind else [])
    return found


class Shell:
    """Runs blocks in a folder, with `corral` on PATH and a state folder of its own."""

    def __init__(self, folder: Path, state: Path, **variables: str) -> None:
        self._folder = folder
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        shim = bin_folder / "corral"
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m corral "$@"\n')
        shim.chmod(0o755)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
        path = f"{bin_folder}:{clean['PATH']}"
        self.env: Mapping[str, str] = {
            **clean, **python_env(), "PATH": path, "CORRAL_STATE": str(state), **variables,
        }  # fmt: skip

    def run(self, block: str, **variables: str) -> str:
        """What a block prints; AssertionError where a line of it fails."""
        argv = ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(
            argv, cwd=self._folder, env={**self.env, **variables}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr
