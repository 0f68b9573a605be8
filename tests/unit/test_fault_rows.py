"""What docs/faults.md has and the table of a run has not is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fault_rows import PAGE, WORDS, able, missing, printed, rows

TEXT = PAGE.read_text()
ROWS = rows(TEXT)
NAMES = {"API", "GPU", "CPU", "RST", "STOP"}
"""Words in capitals that stand for themselves."""


def table(pairs: list[tuple[str, str]]) -> str:
    """As a run writes it (tests/faults/conftest.py), with a value for each word that stands for one."""
    cells = [("fault", "runs", "bar", "measured"), *((fault, "5", bar, "0; 1  or 2 s") for fault, bar in pairs)]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + [row[3]] for row in cells]
    return "".join("  ".join(row) + "\n" for row in padded)


PAIRS = [(WORDS.sub("/v1/x, 3", fault), WORDS.sub("404", bar)) for fault, _, bar, _ in ROWS]


def test_a_whole_table_lacks_nothing_in_one_piece_or_in_several() -> None:
    assert len(ROWS) > 70
    assert list(printed(table(PAIRS))) == PAIRS
    lanes = table(PAIRS[:9]) + table(PAIRS[9:30]) + table(PAIRS[30:])
    assert missing(TEXT, lanes) == []


@pytest.mark.parametrize("at", range(len(ROWS)), ids=lambda at: ROWS[at][0])
def test_a_row_that_is_not_there_is_named_and_no_other(at: int) -> None:
    assert missing(TEXT, table(PAIRS[:at] + PAIRS[at + 1 :])) == [f"{ROWS[at][0]} ({ROWS[at][3]})"]


def test_a_row_with_another_bar_is_not_the_one_of_the_page() -> None:
    assert len(missing(TEXT, table([(PAIRS[0][0], "0 of 8 lost"), *PAIRS[1:]]))) == 1


def test_words_in_capitals_are_known() -> None:
    found = {
        word for fault, _, bar, _ in ROWS for word in re.findall(r"\b[A-Z]{2,}\b", WORDS.sub("", f"{fault} {bar}"))
    }
    assert found <= NAMES


def test_without_a_table_all_is_missing() -> None:
    assert len(missing(TEXT, "")) == len(ROWS)


@pytest.mark.parametrize("lacks", [0, 1])
def test_a_run_that_is_the_last_one_fails_where_a_row_is_missing(tmp_path: Path, lacks: int) -> None:
    tests = PAGE.parents[1] / "tests"
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults/conftest.py").write_text((tests / "faults/conftest.py").read_text())
    (tmp_path / "faults/test_one.py").write_text(
        f"def test_one(matrix):\n    matrix({PAIRS[1][0]!r}, {PAIRS[1][1]!r}, '0')\n"
    )
    (tmp_path / "before").write_text(table(PAIRS[2:] if lacks else [PAIRS[0], *PAIRS[2:]]))
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent / "api-gateway")]),
        "CORRAL_FAULTS_TABLE": str(tmp_path / "table"),
        "CORRAL_FAULTS_BEFORE": str(tmp_path / "before"),
    }
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "faults"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    named = [line for line in done.stdout.splitlines() if line.startswith("not in the table of faults: ")]
    assert len(named) == lacks, done.stdout
    assert done.returncode == int(lacks and able()), done.stdout
    assert "1 passed" in done.stdout.splitlines()[-1]
