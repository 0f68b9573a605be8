"""The table of faults that tests/faults prints: what failed stands in it as failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SOME = """
import pytest

def test_holds(matrix):
    matrix("a node dies", "0 lost", "0 of 8")

def test_holds_again(matrix):
    matrix("a node dies", "0 lost", "0 of 9")

def test_fails_after_its_row(matrix):
    matrix("black hole", "<= 2 s", "7.0 s")
    assert False

def test_fails_before_its_row(matrix):
    assert False

def test_has_no_row_and_holds():
    pass

@pytest.fixture
def broken():
    raise OSError

def test_cannot_begin(broken, matrix):
    matrix("never", "-", "-")
"""


def test_what_failed_is_in_the_table_as_failed(tmp_path: Path) -> None:
    folder = tmp_path / "faults"
    folder.mkdir()
    (folder / "conftest.py").write_text((TESTS / "faults/conftest.py").read_text())
    (folder / "test_some.py").write_text(SOME)
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "api-gateway")])
    given = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    env = {**given, "PYTHONPATH": path, "CORRAL_FAULTS_TABLE": str(tmp_path / "table")}
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(folder)]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert "2 failed, 3 passed, 1 error" in done.stdout, done.stdout + done.stderr
    rows = [
        [cell.strip() for cell in line.split("  ") if cell] for line in (tmp_path / "table").read_text().splitlines()
    ]
    assert rows == [
        ["fault", "runs", "bar", "measured"],
        ["a node dies", "2", "0 lost", "0 of 8; 0 of 9"],
        ["black hole", "1", "<= 2 s", "FAILED: 7.0 s"],
        ["test_some.py::test_fails_before_its_row", "1", "-", "FAILED: nothing"],
        ["test_some.py::test_cannot_begin", "1", "-", "FAILED: nothing"],
    ]
    assert "FAILED: 7.0 s" in done.stdout.partition("= faults =")[2]
