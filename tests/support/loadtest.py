"""`corral loadtest run`, as tests run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from corral.loadtest.result import Result
from support.servers import REPOSITORY, python_env


def command(url: str, *arguments: str) -> list[str]:
    """The command line."""
    return [sys.executable, "-P", "-m", "corral", "loadtest", "run", "--url", url, *arguments]


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Nothing of this machine's own Corral, but ``env``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
    return kept | python_env() | dict(env or {})


def run(url: str, folder: Path, *arguments: str, key: str = "") -> tuple[Result, subprocess.CompletedProcess[str]]:
    """Run it to its end: the result, and the process. Without ``key`` none is sent."""
    words = [*arguments, "--json", "--output", str(folder)] + ([] if key else ["--no-key"])
    env = environment({"CORRAL_KEY": key} if key else {})
    done = subprocess.run(
        command(url, *words), env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout.endswith("}\n"), f"status {done.returncode}: {done.stdout[-200:]}\n{done.stderr}"
    found = msgspec.json.decode(done.stdout.encode(), type=Result)
    assert msgspec.json.decode((folder / "result.json").read_bytes(), type=Result) == found
    assert (folder / "report.html").read_text().endswith("</html>\n")
    return found, done
