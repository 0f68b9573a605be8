"""The shell blocks of a runbook, run as an operator would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from support.servers import REPOSITORY, python_env

_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections(name: str) -> dict[str, list[str]]:
    """The blocks of docs/runbooks/NAME.md by the headings they stand under."""
    text = (REPOSITORY / "docs/runbooks" / f"{name}.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {heading: _BLOCK.findall(body) for heading, body in zip(parts[1::2], parts[2::2], strict=True)}


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
            argv, cwd=self._folder, env={**self.env, **variables}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr
