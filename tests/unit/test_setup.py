"""scripts/setup: what it leaves in .venv, and what it says when it is interrupted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from support.process import until

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
import corral.control.main
for module in list(sys.modules.values()):
    spec = getattr(module, "__spec__", None)
    if spec and spec.cached and spec.origin.endswith(".py") and "site-packages" in spec.origin:
        print(spec.cached)
"""


def test_no_process_compiles_a_package_as_it_starts() -> None:
    """Three seconds of each start of control, where PYTHONDONTWRITEBYTECODE is set."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "api-gateway"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    stamp = (ROOT / ".venv" / ".installed-dev").stat().st_mtime
    found = [Path(line) for line in done.stdout.split()]
    assert len(found) > 300
    # Setup made them, not the process that came first.
    assert [path for path in found if not path.exists() or path.stat().st_mtime > stamp] == []


PYTHON = """#!/bin/bash
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip install "*) echo Collecting; echo > "$BEGUN"; sleep 60 ;;
esac
"""


def test_who_interrupts_it_is_told_so_and_not_that_it_failed(tmp_path: Path) -> None:
    for name in ("scripts/setup", "api-gateway/requirements"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    python, begun = tmp_path / "python", tmp_path / "begun"
    python.write_text(PYTHON)
    python.chmod(0o700)
    env = os.environ | {"CORRAL_PYTHON": str(python), "BEGUN": str(begun)}
    setup = subprocess.Popen(
        [tmp_path / "scripts/setup"], env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until(begun.exists, "it installs", 30)
    os.killpg(setup.pid, signal.SIGINT)  # as a terminal does
    _, said = setup.communicate(timeout=30)
    assert setup.returncode == 130
    assert said.endswith("interrupted: what is half made is made anew the next time\n")
    assert not list((tmp_path / ".venv").glob(".installed*"))
