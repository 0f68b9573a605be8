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


def run(folder: Path, runs: int = 1) -> tuple[str, list[list[str]]]:
    """What pytest printed, and the rows of the table's file."""
    (folder / "faults").mkdir()
    (folder / "faults/conftest.py").write_text((TESTS / "faults/conftest.py").read_text())
    (folder / "faults/test_some.py").write_text(SOME)
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "api-gateway")])
    given = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    asked = {"CORRAL_FAULTS_TABLE": str(folder / "table"), "CORRAL_FAULTS_RUNS": str(runs)}
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), "faults"]
    done = subprocess.run(
        argv, cwd=folder, env={**given, "PYTHONPATH": path, **asked}, capture_output=True, text=True, timeout=60
    )
    rows = [[cell.strip() for cell in line.split("  ") if cell] for line in (folder / "table").read_text().splitlines()]
    return done.stdout + done.stderr, rows


def test_what_failed_is_in_the_table_as_failed(tmp_path: Path) -> None:
    said, rows = run(tmp_path)
    assert "2 failed, 3 passed, 1 error" in said, said
    assert rows == [
        ["fault", "runs", "bar", "measured"],
        ["a node dies", "2", "0 lost", "0 of 8; 0 of 9"],
        ["black hole", "1", "<= 2 s", "FAILED: 7.0 s"],
        ["test_some.py::test_fails_before_its_row", "1", "-", "FAILED: nothing"],
        ["test_some.py::test_cannot_begin", "1", "-", "FAILED: nothing"],
    ]
    assert "FAILED: 7.0 s" in said.partition("= faults =")[2]


def test_each_test_runs_as_often_as_is_asked(tmp_path: Path) -> None:
    said, rows = run(tmp_path, 3)
    assert "6 failed, 9 passed, 3 errors" in said, said
    assert rows[1] == ["a node dies", "6", "0 lost", "0 of 8; 0 of 8; 0 of 8; 0 of 9; 0 of 9; 0 of 9"]
    assert rows[2] == ["black hole", "3", "<= 2 s", "; ".join(["FAILED: 7.0 s"] * 3)]
