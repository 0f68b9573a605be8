"""docs/security.md, the tests that it names, and the defences that `scripts/defences` takes out, fit together."""

from __future__ import annotations

import re

import pytest
from defences import DEFENCES
from support.defended import ROOT, Defence

PAGE = (ROOT / "docs/security.md").read_text()
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
ROWS = {int(row): line for line in PAGE.splitlines() for row in re.findall(r"^\| (\d+) \|", line)}
THREATS = range(1, 18)
SEEN_OTHERWISE = {
    "tests/deploy/test_2_egress.py": "needs an engine; the same node reaches its canaries while it has a way out",
    "tests/deploy/test_2_containers.py": "needs an engine; what is asked of it: test_compose_files.py",
}
"""Named on the page, and failing without no Defence."""


@pytest.mark.parametrize("defence", DEFENCES, ids=lambda one: f"{one.row}-{one.file}")
def test_what_is_taken_out_is_there_once(defence: Defence) -> None:
    assert (ROOT / defence.path).read_text().count(defence.there) == 1
    for test in defence.tests.split():
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), test
        assert not name or f"def {name}(" in (ROOT / file).read_text(), test


def test_every_row_names_tests_that_exist() -> None:
    assert ROWS.keys() == set(THREATS)
    for row, line in ROWS.items():
        named = NAMED.findall(line)
        assert named, row
        for file, test in named:
            assert (ROOT / file).is_file(), file
            assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


@pytest.mark.parametrize("row", THREATS)
def test_what_a_row_names_is_what_fails_without_its_defences(row: int) -> None:
    named = {file for file, _ in NAMED.findall(ROWS[row])}
    assert named - SEEN_OTHERWISE.keys() == {file for one in DEFENCES if one.row == row for file in one.files}


def test_what_is_seen_otherwise_is_named_and_needs_an_engine() -> None:
    assert SEEN_OTHERWISE.keys() <= {file for file, _ in NAMED.findall(PAGE)}
    assert all(file.startswith("tests/deploy/") for file in SEEN_OTHERWISE)
