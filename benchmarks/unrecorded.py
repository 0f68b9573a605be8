"""A gateway that records nothing, to see what the record costs: `benchmarks/request --record`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNRECORDED = {
    "exchange.py": (
        "        self._appended = self.gateway.journal.record(settle.admitted(self), self)\n",
        "        self._appended = self.gateway.journal.unwritten(self)\n",
    ),
    "settle.py": (
        "        answer_hash(exchange, outcome),\n        exchange.model_digest,\n",
        "        None,\n        None,\n",
    ),
    "journal.py": (
        "        payload = _encode(record)\n        waiting = self._waiting\n",
        "        if access:\n"
        "            self.access.line(_encode(record))\n"
        "        return self.unwritten(waiter)\n"
        "\n"
        "    def unwritten(self, waiter: Waiter) -> bool:\n"
        "        if not self._waiting:\n"
        "            self._loop.call_soon(self._commit)\n"
        "        self._waiting.append(waiter)\n"
        "        return True\n"
        "\n"
        "    def written(\n"
        "        self, record: msgspec.Struct, waiter: Waiter, access: bool = False, follows: bool = False\n"
        "    ) -> bool:\n"
        "        payload = _encode(record)\n        waiting = self._waiting\n",
    ),
}
"""What of the gateway's sources is otherwise where nothing is recorded. The access log, which is no record, stays, and
so does the turn of the event loop that those share who wait for their record: what they do in it is no cost of it.
"""


def without_record(name: str) -> str:
    """The source of one of these files as it is then. SystemExit where it is not what stands above."""
    before, after = UNRECORDED[name]
    source = (ROOT / "api-gateway" / "corral" / "gateway" / name).read_text()
    if source.count(before) != 1:
        raise SystemExit(f"{name} is not what this benchmark knows: bring UNRECORDED up to date")
    return source.replace(before, after)


def unrecorded(folder: Path) -> Path:
    """The package with a gateway that records nothing, compiled like the other; takes a minute or two."""
    print("compiling a gateway without the record", file=sys.stderr)
    package = folder / "unrecorded" / "api-gateway"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "api-gateway" / "corral", package / "corral", ignore=ignored)
    for name in ("monitoring", "benchmarks", "docs"):
        (package.parent / name).symlink_to(ROOT / name)
    for name in UNRECORDED:
        (package / "corral" / "gateway" / name).write_text(without_record(name))
    done = subprocess.run(
        [sys.executable, ROOT / "api-gateway" / "compile.py", package], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"it was not compiled:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return package
