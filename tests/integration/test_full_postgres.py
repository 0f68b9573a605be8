"""PostgreSQL's disk is full: requests go on, no record is lost or taken twice, and who watches sees that they wait."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import yaml
from support.fleet import QUICK, SimulatedNode
from support.load import CHAT, WHOLE, Load
from support.metrics import page
from support.mixed import counts
from support.postgres import DATA, TABLES, Postgres, name_of
from support.postgres import postgres as run_postgres
from support.process import until
from support.servers import REPOSITORY
from support.stack import Stack
from support.stack import stack as run_stack

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small disk")

LAG = 5.0
"""Seconds that records wait before this is taken for more than a slow machine."""
SIZES = {DATA: "128m", TABLES: "24m"}
INFERENCE = "FROM audit WHERE api <> 'admin'"


@pytest.fixture(params=SIZES)
def server(request: pytest.FixtureRequest) -> Iterator[Postgres]:
    """PostgreSQL with all that it writes on a small disk, or with its tables there and its log elsewhere."""
    with run_postgres(request.param, SIZES[request.param]) as made:
        yield made


@pytest.fixture
def node(tmp_path: Path) -> Iterator[SimulatedNode]:
    made = SimulatedNode("node-1", tmp_path)
    yield made
    made.process.end(signal.SIGKILL)


class Watched:
    """What the metrics of a stack say of its records."""

    def __init__(self, up: Stack) -> None:
        known = json.loads((up.state / "run/stack.json").read_text())
        (gateway,) = known["gateways"]
        self._gateway, self._control = gateway["metrics"], known["control"]["metrics"]

    @property
    def lag(self) -> float:
        """What IngestBehind looks at, in seconds."""
        rules = (REPOSITORY / "monitoring/prometheus/rules/traffic.yml").read_text()
        (metric,) = re.findall(r"alert: IngestBehind\n\s+expr: (\w+) > \d+\n", rules)
        return page(self._control).value(metric)

    @property
    def waiting(self) -> float:
        """Bytes of records that control has not taken."""
        return page(self._gateway).value("corral_spool_bytes")

    @property
    def database(self) -> bool:
        """What DatabaseDown looks at."""
        return page(self._control).value("corral_database_up") == 1


def fill_log(server: Postgres) -> bool:
    """Have PostgreSQL write to its log until there is no room for it; whether it has ended for that."""
    assert server.disk is not None
    server.disk.fill()
    try:
        while server.alive:
            server.execute("SELECT pg_logical_emit_message(true, '', repeat('x', 100000))")
    except psycopg.OperationalError:
        return not server.alive
    return True


def test_no_record_is_lost_or_taken_twice(tmp_path: Path, server: Postgres, node: SimulatedNode) -> None:
    disk, url = server.disk, server.database()
    assert disk is not None
    settings = {
        "limits": {"default": {"rpm": None, "tpm": None, "concurrency": None}},
        "store": {"database": url},
        "audit": {"checkpoint": "1s"},
    }
    (tmp_path / "corral.yaml").write_text(yaml.safe_dump(settings))

    def rows(what: str) -> list[tuple[Any, ...]]:
        return server.execute(what, name_of(url))

    with run_stack(tmp_path / "state", "--config", str(tmp_path / "corral.yaml"), f"--attach={node.url}") as up:
        watched = Watched(up)
        admin = httpx.Client(base_url=up.url, headers={"Authorization": f"Bearer {up.admin_key}"}, timeout=60)
        made: list[int] = []

        def refused() -> bool:
            disk.fill()
            answer = admin.post("/admin/keys", json={"name": f"full-{len(made)}"})
            made.append(answer.status_code)
            assert answer.status_code in (201, 503), answer.text
            return answer.status_code == 503

        with admin, Load(up.url, up.key, QUICK, clients=2, paths=[CHAT], tokens=(3, 16), think=0.01) as load:
            load.more(50)
            until(lambda: rows(f"SELECT count(*) {INFERENCE} AND outcome = 'ok'") >= [(20,)], "records are taken")
            disk.fill()
            try:
                until(lambda: disk.fill() or watched.lag > LAG, "the records wait", 180)
                if server.small == DATA:
                    until(lambda: fill_log(server), "it has no room for its log, and ends", 120)
                until(refused, "what cannot be recorded is not done", 120)
                # One that ended is seen by both alerts, and one that answers by that of the records alone.
                until(lambda: watched.database == server.alive, "whether it answers")
                log = (up.state / "logs/control.log").read_text()
                assert "No space left on device" in log, "whoever looks for the reason finds it"
                lag, waiting = watched.lag, watched.waiting
                load.more(50)
                until(lambda: watched.lag > lag and watched.waiting > waiting, "more of them wait, and for longer")
            finally:
                disk.free()
                if not server.alive:
                    server.start()
            load.more(50)
            until(lambda: admin.post("/admin/keys", json={"name": "room"}).status_code == 201, "there is room", 120)
        assert load.unlike(WHOLE) == [], "requests do not wait for the database"
        until(lambda: (watched.waiting, watched.lag) == (0, 0), "every record is taken", 120)
        answers = {answer.request_id: counts(answer) for answer in load.answers}
        # One more is of the stack itself: at its start it asks for the models.
        recorded = rows(f"SELECT request_id, outcome, prompt_tokens, tokens {INFERENCE} AND request_id LIKE 'load%'")
        assert Counter(row[0] for row in recorded) == Counter(answers.keys()), "each has one record"
        assert {row[0]: row[1:] for row in recorded} == {one: ("ok", *told) for one, told in answers.items()}
        (used,) = rows("SELECT sum(requests), sum(prompt_tokens), sum(tokens) FROM usage")
        (booked,) = rows(f"SELECT count(*), sum(prompt_tokens), sum(tokens) {INFERENCE}")
        assert tuple(map(int, used)) == tuple(map(int, booked)), "each is counted once"
        keys = rows("SELECT count(*) FROM keys WHERE name LIKE 'full-%'")
        entered = "api = 'admin' AND method = 'POST' AND outcome = 'ok' AND after->>'name' LIKE 'full-%'"
        assert keys == rows(f"SELECT count(*) FROM audit WHERE {entered}"), "what is done is on record"
        assert keys >= [(made.count(201),)]
        assert up.corral("audit", "verify")["problems"] == []
