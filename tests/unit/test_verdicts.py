"""What control has found of models' files outlives it, on both databases; it is tried anew, and ends, at its time."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Connection

from corral.control.prober import Member
from corral.control.selftest import AGAIN, PASSED, SelfTest
from corral.store import verdicts
from corral.store.database import Database
from corral.store.verdicts import FORGOTTEN, Verdict, fit

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64
WHY = "its answers are more than text"


class Broken(Database):
    """A database that is away."""

    def __init__(self) -> None:
        pass

    async def read(self, function: Any, *args: Any) -> Any:
        raise OSError("away")

    write = read


def entry(name: str, digest: str) -> dict[str, Any]:
    return {"name": name, "digest": digest}


def node(version: str = "0.17.4", name: str = "n") -> Member:
    models = [entry("m:latest", ONE), entry("other:latest", TWO)]
    return Member(name, "http://n", up=True, version=version, ps=models, tags=models)


class Control:
    """A control's tests, on these nodes; ``told`` is what gateways heard last."""

    def __init__(self, database: Database, *nodes: Member) -> None:
        async def nobody(name: str) -> int | None:
            return None

        fleet: Any = SimpleNamespace(members={one.name: one for one in nodes})
        self.told: dict[str, str] | None = None
        self.tests = SelfTest(fleet, {}, nobody, self.hear, database, lambda: True)

    def hear(self, continuable: dict[str, str]) -> None:
        self.told = continuable

    def due(self, later: float = 0.0) -> set[str]:
        """The models that are to be tried, so many seconds from now."""
        return {found["name"] for _, found in self.tests._due(time.time() + later)}

    def find(self, digest: str, said: str) -> None:
        (member, *_) = self.tests._fleet.members.values()
        self.tests._found(digest, said, f"0.1.0 {member.version}")


@pytest.fixture(autouse=True)
def version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral.control.selftest.__version__", "0.1.0")


def test_the_next_control_knows_what_was_found(database: Database) -> None:
    first, second = Control(database, node()), Control(database, node())
    assert first.due() == {"m:latest", "other:latest"}
    first.find(ONE, PASSED)
    first.find(TWO, WHY)
    asyncio.run(first.tests.exchange())
    asyncio.run(second.tests.load())
    assert second.told == {"m:latest": ONE}
    assert second.tests.said(TWO) == WHY
    assert second.due() == set()
    # Who runs already hears of what is found later.
    first.find(TWO, PASSED)
    asyncio.run(first.tests.exchange())
    asyncio.run(second.tests.exchange())
    assert second.told == {"m:latest": ONE, "other:latest": TWO}


def test_what_did_not_pass_is_tried_again_and_by_a_clock_that_was_set_back_too(database: Database) -> None:
    first, second = Control(database, node()), Control(database, node())
    first.find(ONE, PASSED)
    first.find(TWO, WHY)
    asyncio.run(first.tests.exchange())
    asyncio.run(second.tests.load())
    for control in (first, second):
        assert control.due(AGAIN / 2) == set()
        assert control.due(AGAIN + 60) == {"other:latest"}
        assert control.due(-3600.0) == {"other:latest"}


def test_other_versions_try_it_anew_and_what_was_found_holds_until_then(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Control(database, node())
    first.find(ONE, PASSED)
    first.find(TWO, PASSED)
    asyncio.run(first.tests.exchange())
    some, all_of_them = Control(database, node(), node("0.18.0", "new")), Control(database, node("0.18.0"))
    for control in (some, all_of_them):
        asyncio.run(control.tests.load())
        assert control.told == {"m:latest": ONE, "other:latest": TWO}
    assert some.due() == set()
    assert all_of_them.due() == {"m:latest", "other:latest"}
    all_of_them.find(ONE, WHY)
    all_of_them.find(TWO, PASSED)
    asyncio.run(all_of_them.tests.exchange())
    assert all_of_them.due() == set()
    asyncio.run(first.tests.exchange())
    assert first.told == {"other:latest": TWO}
    monkeypatch.setattr("corral.control.selftest.__version__", "0.2.0")
    assert all_of_them.due() == {"m:latest", "other:latest"}


def test_a_database_that_is_away_takes_nothing_from_a_control(database: Database) -> None:
    control, away = Control(database, node()), Broken()
    control.find(ONE, PASSED)
    asyncio.run(control.tests.exchange())
    control.tests._database = away
    control.find(TWO, PASSED)
    with pytest.raises(OSError, match="away"):
        asyncio.run(control.tests.exchange())
    assert control.tests.continuable() == {"m:latest": ONE, "other:latest": TWO}
    control.tests._database = database
    asyncio.run(control.tests.exchange())
    later = Control(database, node())
    asyncio.run(later.tests.load())
    assert later.told == {"m:latest": ONE, "other:latest": TWO}


def test_who_does_not_judge_tries_nothing(database: Database) -> None:
    tried: list[str] = []

    async def run(judges: bool) -> None:
        control = Control(database, node())
        control.tests._judges = lambda: judges
        done = asyncio.Event()

        async def streams(name: str) -> int:
            tried.append(name)
            return 99

        def hear(continuable: dict[str, str]) -> None:
            done.set()

        control.tests._streams, control.tests._on_change = streams, hear
        task = asyncio.create_task(control.tests.run())
        await done.wait()
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(run(False))
    assert tried == []
    asyncio.run(run(True))
    assert tried


def test_files_that_no_node_holds_are_forgotten_and_what_is_no_digest_is_not_kept(database: Database) -> None:
    now = time.time()
    found = Verdict(fit("no \0 text \ud800"), now, "0.1.0 0.17.4")

    def enter(connection: Connection, held: set[str], at: float, **more: Verdict) -> dict[str, Verdict]:
        verdicts.enter(connection, {digest.replace("_", ":"): one for digest, one in more.items()}, held, at)
        return verdicts.read(connection)

    def write(held: set[str], at: float, **more: Verdict) -> dict[str, Verdict]:
        return database.write_now(lambda connection: enter(connection, held, at, **more))

    names = {ONE.replace(":", "_"): found, TWO.replace(":", "_"): found, "d": found}
    assert write(set(), now, **names) == {ONE: found, TWO: found}
    assert found.said == "no  text ?"
    later = now + FORGOTTEN + 60
    assert write({TWO}, later - 120) == {ONE: found, TWO: found}
    assert write({TWO}, later) == {TWO: found}
    newer = replace(found, said=PASSED, at=later)
    assert write({TWO}, later, **{TWO.replace(":", "_"): newer}) == {TWO: newer}


def test_what_was_found_later_stays_unless_it_is_of_the_future(database: Database) -> None:
    def entered(at: float, said: str) -> str:
        def work(connection: Connection) -> str:
            verdicts.enter(connection, {ONE: Verdict(said, at, "v")}, [ONE], 1000.0)
            return verdicts.read(connection)[ONE].said

        return asyncio.run(database.write(work))

    assert entered(900.0, PASSED) == PASSED
    assert entered(950.0, WHY) == WHY
    assert entered(940.0, PASSED) == WHY, "of a control that stood still"
    assert entered(5000.0, PASSED) == PASSED
    assert entered(960.0, WHY) == WHY, "the clock was set back"
