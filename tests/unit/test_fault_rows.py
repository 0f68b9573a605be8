"""What docs/faults.md has and the table of a run has not is named."""

from __future__ import annotations

import re
from pathlib import Path

import fault_rows
import pytest
from fault_rows import PAGE, WORDS, main, missing, printed, rows

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


def test_without_a_table_all_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault_rows, "able", lambda: True)
    assert main(str(tmp_path / "none")) == 1
    assert len(capsys.readouterr().out.splitlines()) == len(ROWS)
    (tmp_path / "table").write_text(table(PAIRS))
    assert main(str(tmp_path / "table")) == 0
    assert capsys.readouterr().out == ""


def test_what_a_machine_cannot_make_is_named_and_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault_rows, "able", lambda: False)
    (tmp_path / "table").write_text(table(PAIRS[1:]))
    assert main(str(tmp_path / "table")) == 0
    assert PAIRS[0][0] in capsys.readouterr().out
