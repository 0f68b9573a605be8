"""The database: migrations, its mode, and the spool's way into it."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, insert, select, text

from corral.store import tenants
from corral.store.database import MIGRATIONS, Database, DatabaseError, DatabaseTooNew, resolve, revisions
from corral.store.ingest import WrongOffset, ingest
from corral.store.spool import HEADER, SpoolCorrupt, encode_frame
from corral.store.tables import audit, audit_content, keys, metadata


@pytest.fixture
def database(tmp_path: Path, database_url: str) -> Any:
    made = Database(resolve(database_url, tmp_path))
    made.migrate()
    yield made
    made.close()


sqlite_alone = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def rows(database: Database) -> list[dict[str, Any]]:
    return database.read_now(
        lambda connection: [dict(row) for row in connection.execute(select(audit).order_by(audit.c.seq)).mappings()]
    )


def admit(number: int = 1, **fields: Any) -> dict[str, Any]:
    record = {"t": "admit", "id": f"edge-{number}", "request_id": "shown", "ts": 1.5, "gw": "g", "key": "k"}
    return {**record, "addr": "::1", "api": "native", "route": "/api/chat", "model": "m:latest", **fields}


def settle(number: int = 1, **fields: Any) -> dict[str, Any]:
    done = {"method": "POST", "status": 200, "outcome": "ok", "node": "node-1", "attempts": 1, "req_bytes": 9}
    measured = {"resp_bytes": 8, "prompt_tokens": 7, "tokens": 6, "estimated": False}
    times = {"queue_ms": 0.5, "ttft_ms": None, "ms": 12.25}
    return {**admit(number), "t": "settle", **done, **measured, **times, **fields}


def take(database: Database, offset: int, data: bytes, segment: str = "00000001.seg") -> int:
    return database.write_now(ingest, "gateway-1", segment, offset, data).watermark


def test_migrations_make_the_tables_of_this_version(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_a_new_database_is_empty_for_a_backup_to_fill(database: Database) -> None:
    for table in metadata.sorted_tables:
        assert database.read_now(lambda connection, one=table: connection.execute(select(one)).all()) == [], table.name


def test_migrate_again_changes_nothing(database: Database) -> None:
    version = database.version()
    database.migrate()
    assert database.version() == version == revisions()[-1]


def test_the_names_of_the_migrations_are_their_versions() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    newest_first = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert revisions() == newest_first[::-1]


@sqlite_alone
def test_a_start_with_nothing_to_migrate_loads_no_migrations(database: Database, tmp_path: Path) -> None:
    code = (
        "import sys; from corral.store.database import Database; import corral.control.app;"
        f"Database('sqlite:///{tmp_path}/corral.db').migrate();"
        "late = ('alembic', 'mako', 'psycopg', 'sqlalchemy.dialects.postgresql');"
        "print([name for name in late if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(MIGRATIONS.parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_rows_of_an_older_schema_live_on(tmp_path: Path, database_url: str) -> None:
    older = Database(resolve(database_url, tmp_path))
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")

    def begin(connection: Connection) -> None:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for name, tenant in (("k", "team-a"), ("l", "team-a"), ("m", "team-b")):
            what = "id, name, tenant, role, models, class, created"
            values = f"'{name}', 'n', '{tenant}', 'inference', '[]', 'batch', 2.5"
            connection.execute(text(f"INSERT INTO keys ({what}) VALUES ({values})"))
        connection.execute(text("INSERT INTO audit (id, ts, tokens) VALUES ('old', 1.5, 6)"))
        connection.execute(text("INSERT INTO audit (id, ts, key) VALUES ('own', 1.5, 'm'), ('lost', 1.5, 'x')"))

    older.write_now(begin)
    older.migrate()
    found = [(row["id"], row["tokens"], row["estimated"], row["tenant"]) for row in rows(older)]
    assert found == [("old", 6, None, None), ("own", None, None, "team-b"), ("lost", None, None, None)]
    owners = older.read_now(tenants.listed)
    assert [(owner["name"], owner["keys"]) for owner in owners] == [("team-a", 2), ("team-b", 1)]
    assert [owner["created"] for owner in owners] == [2.5, 2.5]
    older.close()


def test_a_newer_database_is_refused_with_both_versions(database: Database) -> None:
    database.write_now(lambda connection: connection.execute(text("UPDATE alembic_version SET version_num='9999'")))
    with pytest.raises(DatabaseTooNew, match=rf"9999.*{revisions()[-1]}"):
        database.migrate()
    assert database.version() == "9999"


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "corral.db").write_bytes(b"not a database at all, but long enough to be looked at" * 20)
    database = Database(resolve("sqlite:///corral.db", tmp_path))
    with pytest.raises(DatabaseError, match=r"corral\.db"):
        database.migrate()
    database.close()


@sqlite_alone
def test_files_are_private_and_in_wal_mode(database: Database, tmp_path: Path) -> None:
    database.write_now(lambda connection: connection.execute(insert(audit).values(id="a", ts=1.0)))
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    with sqlite3.connect(tmp_path / "corral.db") as plain:
        assert plain.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    plain.close()


def test_a_failed_write_leaves_nothing(database: Database) -> None:
    def half(connection: Any) -> None:
        connection.execute(insert(audit).values(id="a", ts=1.0))
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        database.write_now(half)
    assert rows(database) == []


def test_admit_inserts_and_settle_completes(database: Database) -> None:
    first, second = encode_frame(admit()), encode_frame(settle())
    offset = take(database, 0, first)
    assert [(row["id"], row["outcome"]) for row in rows(database)] == [("edge-1", None)]
    assert take(database, offset, second) == len(first) + len(second)
    (row,) = rows(database)
    expected = {name: value for name, value in settle().items() if name not in ("t", "gw")}
    assert {name: row[name] for name in expected} == expected
    assert row["gw"] == "gateway-1", "the spool's own name counts, not what a record says"


def test_settle_before_admit_stays_settled(database: Database) -> None:
    offset = take(database, 0, encode_frame(settle()))
    take(database, offset, encode_frame(admit()))
    (row,) = rows(database)
    assert (row["outcome"], row["tokens"]) == ("ok", 6)


def test_the_first_settle_counts(database: Database) -> None:
    offset = take(database, 0, encode_frame(settle()))
    take(database, offset, encode_frame(settle(tokens=600)))
    assert [row["tokens"] for row in rows(database)] == [6]


def test_two_requests_of_one_shown_id_are_two_rows(database: Database) -> None:
    take(database, 0, encode_frame(settle(1)) + encode_frame(settle(2)))
    assert [row["request_id"] for row in rows(database)] == ["shown", "shown"]


def test_the_same_frames_again_are_refused(database: Database) -> None:
    data = encode_frame(settle())
    take(database, 0, data)
    with pytest.raises(WrongOffset) as raised:
        take(database, 0, data)
    assert raised.value.offset == len(data)
    assert len(rows(database)) == 1


def test_an_unfinished_tail_is_left_for_later(database: Database) -> None:
    first, second = encode_frame(admit(1)), encode_frame(admit(2))
    assert take(database, 0, first + second[:-1]) == len(first)
    assert take(database, len(first), second) == len(first) + len(second)
    assert len(rows(database)) == 2


def test_a_corrupt_frame_is_named_by_its_place_in_the_segment(database: Database) -> None:
    good, bad = encode_frame(admit(1)), bytearray(encode_frame(admit(2)))
    bad[-1] ^= 1
    assert take(database, 0, good + bytes(bad)) == len(good)
    with pytest.raises(SpoolCorrupt) as raised:
        take(database, len(good), bytes(bad))
    assert raised.value.offset == len(good)
    assert len(rows(database)) == 1


def test_a_field_of_the_wrong_type_costs_the_field_alone(database: Database) -> None:
    take(database, 0, encode_frame(settle(tokens="many", status=True, model="a\0b")))
    (row,) = rows(database)
    assert (row["tokens"], row["status"], row["model"], row["ms"]) == (None, None, "ab", 12.25)


def test_whatever_number_a_record_has_it_is_taken(database: Database) -> None:
    huge = settle(ts=10**400, ms=-(10**400), tokens=10**30)
    payload = json.dumps(huge).encode()
    take(database, 0, HEADER.pack(len(payload), zlib.crc32(payload)) + payload)
    (row,) = rows(database)
    assert (row["ms"], row["tokens"], row["outcome"]) == (None, None, "ok")


def test_what_is_kept_of_a_request_is_kept_once_and_for_its_time_at_most(database: Database) -> None:
    now = time.time()
    kept = {"t": "content", "of": "edge-1", "ts": now + 1e9, "data": "AAAA"}
    others = [{**kept, "of": f"r{number}"} for number in range(1000)]
    begun = [{"t": "begin", "gw": "gateway-1", "ts": now}] * 1000
    data = b"".join(encode_frame(one) for one in (kept, {**kept, "data": "BBBB"}, *others, *begun))
    statements: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    offset = take(database, 0, data)
    assert len(statements) < 20, "the gateway that waits for an answer would give up"
    take(database, offset, encode_frame({**kept, "data": "CCCC"}))
    found = database.read_now(lambda c: c.execute(select(audit_content.c.data, audit_content.c.ts)).all())
    assert len(found) == 1001
    assert {bytes(row.data) for row in found} == {bytes(3)}, "the first counts"
    assert all(now - 60 < row.ts <= time.time() for row in found), "a wrong clock keeps nothing for ever"


def test_use_of_a_key_is_noted(database: Database) -> None:
    now = time.time()
    row = {"id": "k", "name": "n", "tenant": "t", "role": "inference", "models": ["*"], "class": "batch"}
    database.write_now(lambda connection: connection.execute(insert(keys).values(**row, created=now)))
    offset = take(database, 0, encode_frame(settle(1, ts=50.0)))
    take(database, offset, encode_frame(settle(2, ts=40.0)))
    assert database.read_now(lambda connection: connection.execute(select(keys.c.last_used)).scalar()) == 50.0


def test_a_call_that_connects_after_the_close_keeps_no_connection(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, closed, read = threading.Event(), threading.Event(), database.read_now

    def late(*call: Any) -> Any:
        begun.set()
        assert closed.wait(60)
        return read(*call)

    async def ask() -> None:
        asked = asyncio.create_task(database.read(lambda connection: connection.execute(text("SELECT 1")).scalar()))
        await asyncio.to_thread(begun.wait, 60)
        database.close()
        closed.set()
        assert await asked == 1

    monkeypatch.setattr(database, "read_now", late)
    asyncio.run(ask())
    pool: Any = database.engine.pool
    assert (pool.checkedin(), pool.checkedout()) == (0, 0)


class AtOnce(ThreadPoolExecutor):
    """Does what it is given before it returns: every step of the event loop is known."""

    def submit(self, function: Any, /, *args: Any, **more: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args, **more))
        return done


def test_who_is_cancelled_as_a_call_ends_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(f"sqlite:///{tmp_path}/corral.db")
    monkeypatch.setattr(database, "_threads", AtOnce(1))

    async def call() -> None:
        while True:
            assert await database.read(lambda connection: connection.execute(text("SELECT 1")).scalar()) == 1

    async def cancelled_after(steps: int) -> bool:
        task = asyncio.create_task(call())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        ended, _ = await asyncio.wait({task}, timeout=1)
        goes_on = not ended
        while not ended:  # it was lost: once more, or this test has no end
            task.cancel()
            ended, _ = await asyncio.wait({task}, timeout=0.01)
        return not goes_on

    assert [steps for steps in range(20) if not asyncio.run(cancelled_after(steps))] == []
    database.close()


def test_writers_take_turns_and_a_reader_sees_one_state(database: Database) -> None:
    """What a writer has read stays true until it commits, on both kinds; a reader is not held up by it."""
    inside, read, order = threading.Event(), threading.Event(), []

    def count(connection: Connection) -> int:
        return len(connection.execute(select(audit.c.id)).all())

    def slow(connection: Connection) -> None:
        inside.set()
        before = count(connection)
        assert read.wait(60)
        time.sleep(0.3)  # in which the other writer asks for its turn
        assert count(connection) == before
        connection.execute(insert(audit).values(id="slow", ts=1.0))
        order.append("slow")

    def quick(connection: Connection) -> None:
        connection.execute(insert(audit).values(id="quick", ts=1.0))
        order.append("quick")

    def reader(connection: Connection) -> tuple[int, int]:
        before = count(connection)
        database.write_now(lambda other: other.execute(insert(audit).values(id="between", ts=1.0)))
        return before, count(connection)

    thread = threading.Thread(target=database.write_now, args=(slow,))
    thread.start()
    assert inside.wait(60)
    assert database.read_now(count) == 0
    read.set()
    database.write_now(quick)
    thread.join()
    assert order == ["slow", "quick"]
    assert database.read_now(reader) == (2, 2)


def test_migrations_that_start_at_once_take_turns(tmp_path: Path, database_url: str) -> None:
    made = [Database(resolve(database_url, tmp_path)) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(database.migrate) for database in made]:
            done.result()
    assert {database.version() for database in made} == {revisions()[-1]}
    for database in made:
        database.close()
