"""Scripts that take no argument say what they do where they are asked, and do nothing where they are given one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NAMES = ("check", "compile", "install-compose", "install-ollama", "install-postgresql")


@pytest.mark.parametrize("name", NAMES)
def test_a_script_without_arguments_explains_itself(name: str) -> None:
    def run(argument: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([SCRIPTS / name, argument], capture_output=True, text=True, timeout=60, check=False)

    told = run("--help")
    header = (SCRIPTS / name).read_text().splitlines()[1].removeprefix("# ")
    assert (told.returncode, told.stdout.splitlines()[0]) == (0, header)
    assert run("-h").stdout == told.stdout
    refused = run("nonsense")
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", f"usage: scripts/{name}\n")
