"""docs/security.md, the tests that it names, and the defences that `scripts/defences` takes out, fit together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from defences import DEFENCES, ROOT, Defence

PAGE = (ROOT / "docs/security.md").read_text()
ROWS = {int(row): line for line in PAGE.splitlines() for row in re.findall(r"^\| (\d+) \|", line)}


@pytest.mark.parametrize("defence", DEFENCES, ids=lambda one: f"{one.row}-{one.file}")
def test_what_is_taken_out_is_there_once(defence: Defence) -> None:
    assert (ROOT / defence.path).read_text().count(defence.there) == 1
    for test in defence.tests.split():
        assert Path(ROOT / test).is_file(), test


def test_every_row_names_tests_that_exist_and_has_a_defence_to_take_out() -> None:
    assert len(ROWS) >= 15
    for row, line in ROWS.items():
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", line)
        assert named, row
        for file, test in named:
            assert (ROOT / file).is_file(), file
            assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
    assert {one.row for one in DEFENCES} == ROWS.keys()
