"""Takes the defences of docs/security.md out of a copy of the code, one after the other: their tests have to fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support import defended_keys, defended_requests
from support.defended import ROOT, Defence

DEFENCES = defended_requests.DEFENCES + defended_keys.DEFENCES


def copied(folder: Path) -> None:
    """A copy of what git knows of, with this environment."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    # Some tests ask git for the files.
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)


def taken_out(folder: Path, defence: Defence) -> list[str]:
    """Run each of the tests without a defence: the first failure of each, "" for one that passes."""
    file = folder / defence.path
    text = file.read_text()
    file.write_text(text.replace(defence.there, defence.gone))
    try:
        return [first_failure(folder, test) for test in defence.tests.split()]
    finally:
        file.write_text(text)


def first_failure(folder: Path, test: str) -> str:
    """The first test that fails, "" where all pass or none runs."""
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED tests/", "ERROR tests/"))]
    return failed[0].split(" - ")[0] if done.returncode == 1 and failed else ""


def main(rows: list[str]) -> int:
    """Print a line for each defence; 1 where one is not watched."""
    stood = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        for defence in DEFENCES:
            if rows and str(defence.row) not in rows:
                continue
            began = time.monotonic()
            failed = taken_out(folder, defence)
            stood += not all(failed)
            shown = [one or f"{test} DID NOT FAIL" for one, test in zip(failed, defence.tests.split(), strict=True)]
            told = f"row {defence.row:2} {defence.file}: {defence.there.strip()[:60]!r}"
            print(f"{told}: {', '.join(shown)} ({time.monotonic() - began:.0f} s)", flush=True)
    return int(stood > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
