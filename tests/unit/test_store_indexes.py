"""The index that a table of millions of rows gets while it is in use, on PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, insert, inspect, make_url, text
from sqlalchemy.exc import IntegrityError
from support.control import until

from corral.store.database import Database, resolve, revisions, upgrade
from corral.store.indexes import AHEAD
from corral.store.tables import audit

pytestmark = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)

INDEX = "ix_audit_request_id_seq"


@pytest.fixture
def made(tmp_path: Path, database_url: str) -> Iterator[Callable[..., Database]]:
    """Opens a database of the schema before, with options of the server's for its connections."""
    opened: list[Database] = []

    def another(options: str = "") -> Database:
        url = make_url(database_url).update_query_dict({"options": options} if options else {})
        opened.append(Database(resolve(url.render_as_string(hide_password=False), tmp_path)))
        return opened[-1]

    another().write_now(upgrade, "0015")
    yield another
    for database in opened:
        database.close()


def enter(connection: Connection, record: str) -> None:
    connection.execute(insert(audit).values(id=record, ts=1.5, outcome="ok"))


def valid(database: Database) -> list[bool]:
    which = text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)")
    return list(database.read_now(lambda connection: connection.execute(which, {"name": INDEX}).scalars()))


def test_records_come_in_while_the_index_is_built(made: Callable[..., Database]) -> None:
    database, other = made(), made()
    builds = text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX%' AND wait_event_type = 'Lock'")
    with other.engine.connect() as reader:
        enter(reader, "open")  # a transaction that the build waits for
        thread = threading.Thread(target=database.migrate)
        thread.start()
        until("it is built", lambda: other.read_now(lambda connection: connection.execute(builds).scalar()) == 1)

        def write(connection: Connection) -> None:
            connection.execute(text("SET LOCAL lock_timeout = '5s'"))
            enter(connection, "meanwhile")

        other.write_now(write)
        assert valid(other) == [False]
        reader.commit()
    thread.join(60)
    assert valid(other) == [True]
    assert database.version() == revisions()[-1]


def test_what_a_build_that_was_killed_has_left_is_made_anew(made: Callable[..., Database]) -> None:
    database = made()
    for record in ("a", "b"):
        database.write_now(enter, record)
    with (
        database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        pytest.raises(IntegrityError),
    ):
        connection.execute(text(f"CREATE UNIQUE INDEX CONCURRENTLY {INDEX} ON audit (outcome)"))
    assert valid(database) == [False]
    database.migrate()
    assert valid(database) == [True]
    (found,) = [one for one in indexes(database) if one["name"] == INDEX]
    assert (found["column_names"], found["unique"]) == (["request_id", "seq"], False)


def activity(database: Database, where: str) -> int:
    """How many other connections to the database there are that do so."""
    of = "datname = current_database() AND pid <> pg_backend_pid()"
    others = text(f"SELECT count(*) FROM pg_stat_activity WHERE {of} AND ({where})")
    return int(database.read_now(lambda connection: connection.execute(others).scalar_one()))


def test_a_build_by_hand_is_waited_for(made: Callable[..., Database]) -> None:
    database, other = made(), made()
    # It drops it, or asks who builds.
    seen = "query LIKE 'DROP INDEX%' OR query LIKE '%ShareUpdateExclusiveLock%'"
    which = text("SELECT to_regclass(:name)::oid")
    with (
        other.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as operator,
        ThreadPoolExecutor(2) as threads,
        other.engine.connect() as reader,
    ):
        enter(reader, "open")  # a transaction that the build waits for
        build = text(f"CREATE INDEX CONCURRENTLY {INDEX} ON audit (request_id, seq)")
        built = threads.submit(operator.execute, build)
        until("it is built", lambda: valid(other) == [False])
        made_by_hand = reader.execute(which, {"name": INDEX}).scalar()
        started = threads.submit(database.migrate)
        until("control has seen it", lambda: activity(other, seen))
        reader.commit()
        built.result(60)
        started.result(60)
    assert valid(other) == [True]
    assert database.version() == revisions()[-1]
    assert other.read_now(lambda c: c.execute(which, {"name": INDEX}).scalar()) == made_by_hand


@pytest.mark.parametrize("limit", ["statement_timeout", "lock_timeout"])
def test_limits_of_its_role_do_not_end_a_build(made: Callable[..., Database], limit: str) -> None:
    database, other = made(f"-c {limit}=2000"), made()
    longer = "query LIKE 'CREATE INDEX%' AND clock_timestamp() - query_start > interval '2.5 s'"
    with ThreadPoolExecutor(1) as threads, other.engine.connect() as reader:
        enter(reader, "open")  # a transaction that the build waits for
        started = threads.submit(database.migrate)
        until("it took longer", lambda: started.done() or activity(other, longer))
        reader.commit()
        started.result(60)
    assert valid(other) == [True]
    shown = database.read_now(lambda connection: connection.execute(text(f"SHOW {limit}")).scalar())
    assert shown == "2s", "for what is done later"


def indexes(database: Database) -> list[Any]:
    return database.read_now(lambda connection: inspect(connection).get_indexes("audit"))


def test_controls_that_start_at_once_take_turns(made: Callable[..., Database]) -> None:
    several = [made() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(database.migrate) for database in several]:
            done.result()
    assert {database.version() for database in several} == {revisions()[-1]}
    assert valid(several[0]) == [True]
    held = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
    assert several[0].read_now(lambda connection: connection.execute(held).scalar()) == 0


def test_an_index_is_as_its_migration_makes_it(made: Callable[..., Database], database_url: str) -> None:
    ahead, alone = made(), made()
    alone.write_now(upgrade, AHEAD[-1][0])  # as a restore does, in its transaction
    by_migration = indexes(alone)
    for _, name, _ in AHEAD:
        alone.write_now(lambda connection, one=name: connection.execute(text(f"DROP INDEX {one}")))
    alone.write_now(lambda connection: connection.execute(text("UPDATE alembic_version SET version_num = '0015'")))
    ahead.migrate()
    assert indexes(ahead) == by_migration
