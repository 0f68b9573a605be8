"""docs/runbooks/disaster-recovery.md as it is read: after each loss its commands are run, and all serves again."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.operator import Operator
from support.postgres import Postgres, name_of
from support.process import free_port, read_all, until
from support.runbook import sections
from support.servers import REPOSITORY, Server, embedded_node

from corral.config.values import database_url as address

pytestmark = pytest.mark.slow


def blocks(heading: str) -> str:
    """The shell blocks below a heading, in their order."""
    return "\n".join(sections("disaster-recovery")[heading])


class Operators:
    """One after the other: the next one begins anew where the last one's stack serves no more."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: list[Operator] = []

    def one(self) -> Operator:
        if not self._made or not self._serves(self._made[-1]):
            self.end()
            folder = self._folder / f"operator-{len(self._made)}"
            folder.mkdir()
            self._made.append(Operator(folder))
        return self._made[-1]

    def end(self) -> None:
        if self._made:
            self._made[-1].end()

    def _serves(self, operator: Operator) -> bool:
        with suppress(httpx.TransportError):
            return operator.works()
        return False


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operators]:
    made = Operators(tmp_path_factory.mktemp("recovery"))
    yield made
    made.end()


@pytest.fixture
def operator(operators: Operators) -> Operator:
    """One whose stack serves, as it was begun or as a test before has recovered it."""
    return operators.one()


def test_an_operator_that_fails_to_begin_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(operator: Operator) -> bool:
        raise AssertionError("as when the key is not known in time")

    with monkeypatch.context() as patch:
        patch.setattr(Operator, "works", fails)
        with pytest.raises(AssertionError, match="as when"):
            Operator(tmp_path)
    assert list((tmp_path / "state").iterdir())
    running = read_all(Path("/proc").glob("[0-9]*/cmdline"))
    assert not [command for _, command in running if str(tmp_path).encode() in command]


def test_before_anything_is_lost(operator: Operator) -> None:
    said = operator.run(blocks("Before anything is lost"))
    assert said.count(": restores\n") == 2 and said.count(" is taken") == 2, said
    assert not list((operator.state / "run").glob("corral-drill-*"))
    assert operator.works(), "what serves is not disturbed"


def test_lost_control_machine(operator: Operator) -> None:
    operator.run("corral down")
    shutil.rmtree(operator.state)
    operator.run(blocks("Lost control machine"))
    assert operator.works()


def test_lost_database(tmp_path: Path, postgres: Postgres) -> None:
    url = address(postgres.database())
    operator = Operator(tmp_path, url)
    try:
        postgres.execute(f"DROP DATABASE {name_of(url)} WITH (FORCE)")
        postgres.execute(f"CREATE DATABASE {name_of(url)}")
        operator.run(blocks("Lost database"))
        assert operator.works()
    finally:
        operator.end()


def test_corrupt_database(operator: Operator) -> None:
    operator.run("corral down")
    with (operator.state / "corral.db").open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(20000))
    said = operator.run("corral up --detach", status=1)
    assert "malformed" in said or "not a database" in said, said
    operator.run(blocks("Corrupt database"))
    assert not (operator.folder / "salvaged.backup").exists()
    assert operator.works()


def test_lost_valkey(operator: Operator) -> None:
    pid = json.loads(operator.run("corral status --json"))["store"]["valkey"]["pid"]
    os.kill(pid, 9)
    assert operator.works()

    def back() -> bool:
        state = json.loads(operator.run("corral status --json"))["store"]["valkey"]
        return state["state"] == "ready" and state["pid"] != pid

    until(back, "the supervisor has started it again", every=0.5)
    operator.run(blocks("Lost Valkey"))
    assert operator.works()


def test_the_drill_of_the_backup_page(operator: Operator) -> None:
    text = (REPOSITORY / "docs/backup.md").read_text(encoding="utf-8")
    (drill,) = re.findall(r"^```sh\n(corral backup restore \"\$BACKUP\" --state /tmp/drill.*?)^```$", text, re.M | re.S)
    other: Any = operator.folder / "drill"
    script = drill.replace("/tmp/drill", str(other)).replace("8088", str(free_port()))
    assert "ready" in operator.run(script)
    assert operator.works(), "what serves is not disturbed"


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It stays: the stack that has got it goes on with it."""
    with embedded_node(tmp_path_factory.mktemp("another"), backend="simulated") as server:
        yield server


def test_lost_node(operator: Operator, another: Server) -> None:
    operator.env["NEW_NODE"] = another.url
    assert another.url in operator.run(blocks("Lost node"))
    assert operator.works()


def test_lost_pepper(operator: Operator) -> None:
    """The last of this stack: every key ends."""
    (operator.state / "pepper").unlink()
    operator.run(blocks("Lost pepper"))
    assert operator.works()
    operator.run("corral down")
    (operator.state / "pepper").unlink()
    assert "the pepper is gone" in operator.run("corral up --detach", status=1)
    operator.run("corral up --detach --new-pepper")
    assert not operator.works()
