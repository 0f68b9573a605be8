"""Every shell block of a procedure is run by a test, or says what it needs and is checked as far as that goes."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from support.runbook import NOT_HERE, PROCEDURES, fences, sections

from corral.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
SERVICES = set(yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"])
VOLUMES = {f"corral_{name}" for name in yaml.safe_load((ROOT / "docker-compose.yml").read_text())["volumes"]}
COMPOSE = {"build", "cp", "exec", "kill", "logs", "ps", "pull", "restart", "rm", "run", "stop", "up"}
SHELL = {"chmod", "mkdir", "mv", "printf", "rm", "touch"}
HOST = {"systemctl", "nvidia-smi", "df", "dmesg", "tar", "mv"}
WORDS = {"sh", "sh compose", "sh host", "bash", "yaml"}
"""Info strings: run by a test; for Compose; for a node's own machine; what is set once; a file."""


def lines(page: str, info: str) -> Iterator[str]:
    """The lines of a page's blocks of this kind."""
    for _, found, block in fences(page):
        if found == info:
            yield from (line for line in block.splitlines() if line.strip())


def constants(group: str) -> set[str]:
    """Every text in the tests of a group; the headings whose blocks they run are among them."""
    found = set()
    for path in (ROOT / "tests" / group).glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def check(words: list[str]) -> None:
    """Raise where the command line has no such command, option or argument; nothing is run."""
    command: click.Command = cli
    context = click.Context(cli, info_name="corral")
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0]) if words else None
        assert found is not None, words
        command, words = found, words[1:]
        context = click.Context(command, parent=context, info_name=command.name)
    command.make_context(command.name, list(words), parent=context.parent)


@pytest.mark.parametrize("page", PROCEDURES)
def test_every_block_says_what_it_is(page: str) -> None:
    assert not [(heading, info) for heading, info, _ in fences(page) if info not in WORDS]


@pytest.mark.parametrize(("kind", "group"), [("sh", "integration"), ("sh compose", "deploy")])
@pytest.mark.parametrize("page", PROCEDURES)
def test_every_block_is_run_by_a_test(page: str, kind: str, group: str) -> None:
    known = constants(group)
    assert page in known
    missing = [heading for heading, blocks in sections(page, kind).items() if blocks and heading not in known]
    assert not missing, f"{page}.md: no test in tests/{group} runs these sections"


def test_a_line_for_compose_that_is_not_run_is_there() -> None:
    there = {line for page in PROCEDURES for line in lines(page, "sh compose")}
    assert set(NOT_HERE) <= there and all(NOT_HERE.values())


def test_no_block_stands_before_the_first_heading() -> None:
    for page in PROCEDURES:
        assert not [info for heading, info, _ in fences(page) if info == "sh" and not heading], page


@pytest.mark.parametrize("page", PROCEDURES)
def test_blocks_are_shell(page: str) -> None:
    for heading, info, block in fences(page):
        if info.startswith(("sh", "bash")):
            done = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True)
            assert not done.returncode and not done.stderr, f"{heading}: {done.stderr}"


@pytest.mark.parametrize("line", sorted({line for page in PROCEDURES for line in lines(page, "sh compose")}))
def test_commands_for_compose_name_what_there_is(line: str) -> None:
    words = shlex.split(line)
    # Up to where the shell takes over.
    words = words[: next((at for at, word in enumerate(words) if word in ("<", ">", "|", "||", "&&")), len(words))]
    if words[0].startswith("scripts/"):
        assert (ROOT / words[0]).exists()
    elif words[:2] == ["docker", "compose"]:
        assert words[2] in COMPOSE
        rest = words[3:]
        if words[2] in ("exec", "run"):
            at = next(
                place for place, (before, word) in enumerate(zip(["", *rest], rest, strict=False))
                if not word.startswith("-") and before != "-v"
            )  # fmt: skip
            assert rest[at] in SERVICES
            if words[2] == "run":
                check(rest[at + 1 :])
            elif rest[at + 1] == "corral":
                check(rest[at + 2 :])
            elif rest[at + 1 : at + 3] == ["sh", "-c"]:
                assert subprocess.run(["sh", "-n", "-c", rest[at + 3]]).returncode == 0
        elif words[2] == "cp":
            assert rest[0].partition(":")[0] in SERVICES
        else:
            valued = {"--since", "--tail", "--timeout", "-s"}
            named = [word for before, word in zip(["", *rest], rest, strict=False) if before not in valued]
            assert {word for word in named if not word.startswith("-")} <= SERVICES, line
    elif words[:3] == ["docker", "volume", "rm"]:
        assert set(words[3:]) <= VOLUMES
    else:
        assert words[:3] == ["docker", "system", "df"] or words[0] in SHELL, line


def test_commands_for_a_machine_are_common_programs() -> None:
    assert {line.split()[0] for page in PROCEDURES for line in lines(page, "sh host")} <= HOST


def test_every_command_in_a_text_exists() -> None:
    for page in PROCEDURES:
        text = (ROOT / f"docs/runbooks/{page}.md").read_text(encoding="utf-8")
        for words in re.findall(r"`corral\s+([a-z]+(?:\s+[a-z-]+)?)", text):
            noun, *verb = words.split()
            command = cli.get_command(click.Context(cli), noun)
            assert command is not None, f"{page}: corral {words}"
            if isinstance(command, click.Group):
                assert verb and verb[0] in command.list_commands(click.Context(command)), f"{page}: corral {words}"


def test_every_link_of_a_document_leads_somewhere() -> None:
    broken = []
    for path in sorted((ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", path.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            there = (path.parent / name).resolve() if name else path
            if not there.exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
            elif anchor and there.suffix == ".md" and anchor not in anchors(there):
                broken.append(f"{path.relative_to(ROOT)}: {target}: no such heading")
    assert not broken, "\n".join(broken)


def anchors(path: Path) -> set[str]:
    """What headings can be linked as."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
