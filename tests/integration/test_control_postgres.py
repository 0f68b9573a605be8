"""Control on PostgreSQL alone: its address and password, two at once, and a server that is away for a while."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text
from support.control import FakeNode, Running, make_key, until
from support.postgres import PASSWORD, USER, Postgres, name_of
from support.postgres import postgres as run_postgres
from support.process import free_port
from support.servers import python_env

from corral.config.settings import Settings
from corral.control.bootstrap import bootstrap
from corral.store.database import Database, DatabaseAway, DatabaseError, resolve
from corral.store.spool import encode_frame


@pytest.fixture
def own() -> Iterator[Postgres]:
    """A PostgreSQL that a test may stop."""
    with run_postgres() as server:
        yield server


def settings(state: Path, **store: Any) -> Settings:
    return Settings.model_validate({"control": {"state": state}, "store": store})


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_its_address_may_be_written_in_three_ways(tmp_path: Path, postgres: Postgres, scheme: str) -> None:
    url = postgres.database()
    bootstrap(tmp_path, settings(tmp_path, database=url.replace("postgresql", scheme, 1)))
    assert postgres.execute("SELECT name FROM keys", name_of(url)) == [("admin",)]
    assert not list(tmp_path.glob("*.db"))


def test_another_driver_or_a_broken_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="postgresql://user@host/name"):
        settings(tmp_path, database="postgresql+asyncpg://u@h/d")
    with pytest.raises(DatabaseError, match=r"store\.database"):
        bootstrap(tmp_path, settings(tmp_path, database="postgresql://u@h:port/d"))


def test_the_password_comes_from_a_file_for_each_connection(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.url(name_of(postgres.database()), password=None)
    by_file = settings(tmp_path, database=url, database_password_file="database.password")
    with pytest.raises(DatabaseError, match=r"database\.password: .*cannot be read"):
        bootstrap(tmp_path, by_file)
    (tmp_path / "database.password").write_text("wrong\n")
    with pytest.raises(DatabaseError, match="password authentication failed") as raised:
        bootstrap(tmp_path, by_file)
    assert "wrong" not in str(raised.value)
    (tmp_path / "database.password").write_text(PASSWORD + "\n")
    bootstrap(tmp_path, by_file)


def test_a_password_is_in_no_message(tmp_path: Path) -> None:
    address = f"postgresql://{USER}:hush@127.0.0.1:{free_port()}/corral"
    with pytest.raises(DatabaseAway, match="refused") as raised:
        bootstrap(tmp_path, settings(tmp_path, database=address))
    assert "hush" not in str(raised.value)


def test_many_that_start_at_once_make_one_schema_and_one_admin_key(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.database()
    failed = []

    def start() -> None:
        try:
            bootstrap(tmp_path, settings(tmp_path, database=url))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert postgres.execute("SELECT count(*) FROM keys", name_of(url)) == [(1,)]


def test_the_last_admin_key_survives_two_revocations_at_once(tmp_path: Path, postgres: Postgres) -> None:
    control = Running(tmp_path, store={"database": postgres.database()})
    try:
        other = make_key(control, role="admin")
        (own,) = [key["id"] for key in control.admin.get("/admin/keys").json()["keys"] if key["id"] != other["id"]]
        statuses = []

        def revoke(key: str) -> None:
            with control.client(other["key"]) as client:
                statuses.append(client.post(f"/admin/keys/{key}/revoke").status_code)

        threads = [threading.Thread(target=revoke, args=(key,)) for key in (own, other["id"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) in ([200, 401], [200, 409])
    finally:
        control.close()


def test_a_database_that_is_away_costs_what_needs_it_alone(tmp_path: Path, own: Postgres) -> None:
    node = FakeNode()
    control = Running(tmp_path, nodes=[{"url": node.url}], store={"database": own.database()})
    try:
        known = make_key(control, role="operator")
        frame = encode_frame({"t": "admit", "id": "e1", "ts": time.time(), "model": "m:latest"})
        path = "/internal/spool/gateway-1/00000001.seg"
        own.kill()
        refused = control.admin.post("/admin/keys", json={"name": "k"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database_unavailable")
        assert refused.headers["retry-after"]
        assert control.admin.get("/admin/keys").status_code == 503
        assert control.internal.post(path, params={"offset": 0}, content=frame).status_code == 503
        assert healthy(control)
        assert known["id"] in [key["id"] for key in control.snapshot().json()["keys"]]
        status = control.admin.get("/admin/status")
        assert (status.status_code, status.json()["store"]["database"]["state"]) == (200, "down")
        with control.client(known["key"]) as operator:
            assert operator.get("/admin/nodes").status_code == 200
            assert operator.put("/admin/models/catalogue", json=[]).status_code == 403
        with control.client(known["key"][:-8] + "00000000") as stranger:
            assert stranger.get("/admin/nodes").status_code == 401
        own.start()
        until("it takes keys again", lambda: control.admin.post("/admin/keys", json={"name": "k"}).status_code == 201)
        assert control.internal.post(path, params={"offset": 0}, content=frame).json() == {"offset": len(frame)}
        assert [row["id"] for row in control.admin.get("/admin/audit", params={"model": "m:latest"}).json()["audit"]]
    finally:
        control.close()
        node.close()


def test_a_database_that_hangs_holds_up_nothing_else(tmp_path: Path, own: Postgres) -> None:
    control = Running(tmp_path, store={"database": own.database()})
    try:
        assert control.admin.get("/admin/keys").status_code == 200
        own.hold(True)
        stuck = [threading.Thread(target=control.admin.get, args=("/admin/keys",)) for _ in "ab"]
        for thread in stuck:
            thread.start()
        assert control.snapshot().status_code == 200
        assert healthy(control)
        own.hold(False)
        for thread in stuck:
            thread.join()
        assert control.admin.get("/admin/keys").status_code == 200
    finally:
        own.hold(False)
        control.close()


def healthy(control: Running) -> bool:
    with control.client() as nobody:
        return nobody.get("/health").status_code == 200


def test_a_call_that_outlives_the_close_keeps_no_connection(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.database()
    database = Database(resolve(url, tmp_path))
    begun, released = threading.Event(), threading.Event()

    def ask(connection: Connection) -> None:
        connection.execute(text("SELECT 1"))
        begun.set()
        assert released.wait(60)

    async def leave() -> None:
        asked = asyncio.create_task(database.read(ask))
        await asyncio.to_thread(begun.wait, 30)
        asked.cancel()
        await asyncio.wait({asked})

    asyncio.run(leave())
    database.close()
    released.set()
    count = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name_of(url)}'"
    until("the connection is closed", lambda: postgres.execute(count) == [(0,)])


def test_control_waits_for_a_database_that_is_not_there_yet(tmp_path: Path, own: Postgres) -> None:
    url, port = own.database(), free_port()
    own.stop()
    (tmp_path / "corral.yaml").write_text(f"store: {{database: '{url}', valkey: 'redis://127.0.0.1:1/0'}}\n")
    argv = [sys.executable, "-P", "-m", "corral", "serve", "control", "--config", str(tmp_path / "corral.yaml")]
    argv += ["--state", str(tmp_path / "state"), "--listen", f"127.0.0.1:{port}"]
    log = tmp_path / "control.log"
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, env=python_env(), cwd=tmp_path)
    try:
        until("it says so", lambda: "control waits: the database" in log.read_text())
        assert PASSWORD not in log.read_text()
        own.start()
        until("it serves", lambda: f"control listens on 127.0.0.1:{port}" in log.read_text())
    finally:
        process.terminate()
        process.wait(60)
