"""What a control has found of a model's file is what the next one tells gateways, and another one beside it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.control import Running, until
from support.fleet import MODEL, SimulatedNode
from support.postgres import Postgres

from corral.config.values import database_url as address
from corral.store import verdicts
from corral.store.database import Database, resolve


@pytest.fixture
def node(tmp_path: Path) -> Iterator[SimulatedNode]:
    folder = tmp_path / "node"
    folder.mkdir()
    model = {"name": MODEL, "load": 0.0, "prefill": 50000.0, "decode": 2000.0, "slots": 4}
    made = SimulatedNode("node-1", folder, {"models": [model]})
    httpx.post(made.url + "/api/generate", json={"model": MODEL, "keep_alive": -1}).raise_for_status()
    yield made
    made.process.end(signal.SIGKILL)


def control(state: Path, node: SimulatedNode, database: str) -> Running:
    return Running(state, nodes=[{"name": node.name, "url": node.url}], store={"database": database})


def continuable(running: Running) -> dict[str, Any]:
    return dict(running.snapshot().json()["continuable"])


def kept(url: str, state: Path) -> dict[str, Any]:
    database = Database(resolve(url, state))
    try:
        return dict(database.read_now(verdicts.read))
    finally:
        database.close()


def test_the_first_that_a_control_tells_is_what_was_found_before(
    tmp_path: Path, database_url: str, node: SimulatedNode
) -> None:
    first = control(tmp_path / "state", node, database_url)
    try:
        known = until("it has tried the model", lambda: continuable(first))
        assert known.keys() == {MODEL}
        until("it is kept", lambda: kept(database_url, first.state))
    finally:
        first.close()
    node.fault(kind="fail")  # nobody can try it now
    second = control(tmp_path / "state", node, database_url)
    try:
        assert continuable(second) == known
        (model,) = second.admin.get("/admin/models").json()["models"]
        assert model["continuation"] == "passed"
    finally:
        second.close()


def test_a_control_that_does_not_lead_tells_what_the_leader_found(
    tmp_path: Path, postgres: Postgres, node: SimulatedNode
) -> None:
    url = address(postgres.database())
    node.fault(kind="fail")
    first = control(tmp_path / "first", node, url)
    try:
        (tmp_path / "second").mkdir()
        for name in ("pepper", "internal.token", "audit.key", "admin.key"):
            shutil.copy(first.state / name, tmp_path / "second" / name)
        second = control(tmp_path / "second", node, url)
        try:
            assert (continuable(first), continuable(second)) == ({}, {})
            node.well()
            known = until("the leader has tried the model", lambda: continuable(first))
            assert until("the other has heard of it", lambda: continuable(second)) == known
        finally:
            second.close()
    finally:
        first.close()
