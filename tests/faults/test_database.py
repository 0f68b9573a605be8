"""PostgreSQL dies under load: no request is lost, no record is lost, and its return is the end of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.postgres import Postgres
from support.postgres import postgres as run_postgres
from support.process import until
from support.up import Up, corral


@pytest.fixture
def server() -> Iterator[Postgres]:
    with run_postgres() as made:
        yield made


def test_requests_go_on_and_every_record_arrives(
    tmp_path: Path, server: Postgres, matrix: Callable[[str, str, str], None]
) -> None:
    (tmp_path / "corral.yaml").write_text(f"store: {{database: '{server.database()}'}}\n")
    up = Up(tmp_path / "state", "--config", str(tmp_path / "corral.yaml"))
    try:
        told = up.ready()
        headers = {"Authorization": f"Bearer {told['key']}"}
        admin = {"Authorization": f"Bearer {up.state.admin_key.read_text().strip()}"}
        body = {"model": told["model"], "stream": False, "messages": [{"role": "user", "content": "x"}]}

        def ask(number: int) -> int:
            sent = {**headers, "X-Request-ID": f"away-{number}"}
            return httpx.post(f"{up.url}/api/chat", json=body, headers=sent, timeout=60, trust_env=False).status_code

        def status() -> str:
            return str(json.loads(corral("status", "--json", state=up.state.root).stdout)["store"]["database"]["state"])

        with ThreadPoolExecutor(4) as pool:
            before = list(pool.map(ask, range(10)))
            server.kill()
            during = list(pool.map(ask, range(10, 40)))
            assert httpx.post(f"{up.url}/admin/keys", json={"name": "k"}, headers=admin).status_code == 503
            assert status() == "down"
            server.start()
            after = list(pool.map(ask, range(40, 50)))
        assert {*before, *during, *after} == {200}
        until(lambda: status() == "ready", "the database is back", 120)

        def settled() -> set[str]:
            answer = httpx.get(f"{up.url}/admin/audit", params={"limit": 1000}, headers=admin)
            rows = answer.json()["audit"] if answer.status_code == 200 else []
            return {row["request_id"] for row in rows if row["outcome"] == "ok"}

        until(lambda: {f"away-{number}" for number in range(50)} <= settled(), "every record is there", 120)
        made = httpx.post(f"{up.url}/admin/keys", json={"name": "k"}, headers=admin)
        assert made.status_code == 201
        measured = f"0 of {len(before + during + after)} lost, {len(during)} of them while it was away, each on record"
        matrix("PostgreSQL killed (-9) under load", "0 requests, 0 records lost", measured)
    finally:
        up.stop()
