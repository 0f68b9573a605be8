"""Which rows of docs/faults.md have no row in the tables that runs of the tests of faults wrote."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs/faults.md"
CELLS = re.compile(r"^\| (.+?) \| (.+?) \| (.+?) \| `(tests/faults/\w+\.py)` \|$")
HEAD = re.compile(r"fault +runs  bar +measured")
WORDS = re.compile(r"\b(?:FAULT|HOW|KEY|LIMIT|MODEL|N|PROCESS|ROUTE|STATUS|WAY|WHAT|WHEN)\b")
"""On the page they stand for what differs from row to row of the table."""


def rows(page: str) -> list[tuple[str, str, str, str]]:
    """Of the page: a fault, how it is made, its bar, and the file."""
    found = (CELLS.match(line) for line in page.splitlines())
    return [(one[1], one[2], one[3], one[4]) for one in found if one]


def printed(table: str) -> Iterator[tuple[str, str]]:
    """A fault and its bar, of each row of a file that has one table behind the other."""
    runs = bar = measured = 0
    for line in table.splitlines():
        if HEAD.fullmatch(line):
            runs, bar, measured = (line.index(f"  {name}") + 2 for name in ("runs", "bar", "measured"))
        elif runs:
            yield line[:runs].rstrip(), line[bar:measured].rstrip()


def missing(page: str, table: str) -> list[str]:
    """The rows of the page of which the table has none."""
    there = list(printed(table))
    return [
        f"{fault} ({file})"
        for fault, _, bar, file in rows(page)
        if not any(_anything(fault).fullmatch(one) and _anything(bar).fullmatch(other) for one, other in there)
    ]


def _anything(cell: str) -> re.Pattern[str]:
    return re.compile(".+".join(map(re.escape, WORDS.split(cell))))


def able() -> bool:
    """Whether no test is skipped here: links are cut and slowed by root, by a tunnel, and the clock is compiled."""
    return os.geteuid() == 0 and Path("/dev/net/tun").exists() and shutil.which("cc") is not None
