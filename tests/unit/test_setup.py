"""scripts/setup: what it leaves in .venv."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
