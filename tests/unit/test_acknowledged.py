"""Which gateways have a change: who is waited for, and who is named."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from corral.control.gateways import LATELY, PRESENT, Gateway
from corral.control.pages import lags_of
from corral.control.snapshot import Hub, _altered, _changes
from corral.store.actions import enter
from corral.store.database import Database, resolve

STALE = 600.0


@pytest.fixture
def hub() -> Hub:
    fleet: Any = SimpleNamespace(members={}, suspect=lambda *told: None)
    made = Hub(None, fleet, SimpleNamespace(connected=False), [], STALE)  # type: ignore[arg-type]
    made.refresh()
    return made


def hear(hub: Hub, name: str, ago: float = 0.0, version: str = "older", left: bool = False) -> None:
    hub.gateways[name] = Gateway(name, time.time(), version, left=left, at=time.monotonic() - ago)


def told(hub: Hub, within: float = 0.05) -> tuple[list[str], list[str]]:
    return asyncio.run(hub.acknowledged(hub.number, within))


def test_a_gateway_that_is_cut_off_but_may_serve_is_named_and_not_waited_for(hub: Hub) -> None:
    hear(hub, "current", version=hub.version)
    hear(hub, "cut-off", ago=PRESENT + 1)
    # It returns at once: nobody who was heard lately is behind.
    assert told(hub, within=3600.0) == (["current"], ["cut-off"])


def test_one_that_can_serve_no_more_or_said_goodbye_is_not_named(hub: Hub) -> None:
    hear(hub, "stale", ago=STALE + 1)
    hear(hub, "left", left=True)
    assert told(hub, within=3600.0) == ([], [])


def test_one_that_was_heard_is_waited_for_and_named(hub: Hub) -> None:
    hear(hub, "slow")
    hear(hub, "current", version=hub.version)
    assert told(hub) == (["current"], ["slow"])


def test_the_wait_ends_with_the_last_acknowledgement(hub: Hub) -> None:
    hear(hub, "slow")

    async def both() -> tuple[list[str], list[str]]:
        waiting = asyncio.ensure_future(hub.acknowledged(hub.number, 3600.0))
        await asyncio.sleep(0)
        await hub.heard("slow", hub.version)
        return await waiting

    assert asyncio.run(both()) == (["slow"], [])


def test_reads_that_are_recorded_are_no_change_of_keys(database_url: str, tmp_path: Path) -> None:
    database = Database(resolve(database_url, tmp_path))
    try:
        database.migrate()
        seen = []
        for method in ("POST", "GET", "GET", "DELETE"):
            before = database.read_now(_changes) or 0
            database.write_now(lambda connection, method=method: enter(connection, method, "/admin/keys", None, None))  # type: ignore[misc]
            assert database.read_now(_changes) == before + 1
            seen.append(database.read_now(lambda connection, before=before: _altered(connection, before)))  # type: ignore[misc]
        assert seen == [True, False, False, True]
        assert database.read_now(lambda connection: _altered(connection, 1)), "one behind two reads"
    finally:
        database.close()


def test_what_a_gateway_said_of_its_records_holds_while_it_is_heard(hub: Hub) -> None:
    for name, ago in (("here", 0.0), ("slow", PRESENT + 1), ("gone", LATELY + 1)):
        hub.gateways[name] = Gateway(name, time.time(), "v", behind=400.0, at=time.monotonic() - ago)
    assert lags_of(hub.known()) == {"here": 400.0, "slow": 400.0}
