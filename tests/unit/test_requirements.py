"""docs/requirements.md names files, tests and commands that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import click
import pytest

from corral.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/requirements.md").read_text(encoding="utf-8")
ROWS = [row for row in re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", TEXT, re.MULTILINE) if row[0] != "Requirement"]
NEEDED = (
    "load balancing", "failover", "gpu", "volumes", "authentication", "rate limits", "input validation", "audit",
    "health", "metrics", "alert rules", "slack", "dashboards", "preloading", "backup", "restore", "disaster recovery",
    "maintenance", "scaling", "incident response", "load tests", "documentation", "secrets", "tls", "reload",
)  # fmt: skip
"""What a deployment is asked for; each has a row."""


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def functions_of(path: Path) -> set[str]:
    """The test functions of a file."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, functions) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("need", NEEDED)
def test_every_need_has_a_row(need: str) -> None:
    assert [row for row in ROWS if need in row[0].lower()]


@pytest.mark.parametrize(("requirement", "where", "shown"), ROWS, ids=[row[0][:50] for row in ROWS])
def test_what_a_row_names_exists(requirement: str, where: str, shown: str) -> None:
    assert quoted(where) and quoted(shown)
    for path in quoted(where):
        assert (ROOT / path).is_file(), path
    for proof in quoted(shown):
        path, _, test = proof.partition("::")
        program, *words = proof.split()
        if program == "corral":
            command: click.Command | None = cli
            for word in words:
                assert isinstance(command, click.Group), proof
                command = command.get_command(click.Context(command), word)
            assert command is not None and not isinstance(command, click.Group), proof
        elif program == "scripts/test":
            assert len(words) == 1 and re.search(rf"\b{words[0]}\b", (ROOT / "scripts/test").read_text()), proof
        elif path.startswith("tests/"):
            found = functions_of(ROOT / path)
            assert (test in found) if test else found, proof
        else:
            assert (ROOT / program).is_file() and not words, proof
