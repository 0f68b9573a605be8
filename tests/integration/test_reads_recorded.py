"""That the trail was read is in the trail, at once; and when an administrator's key was last used."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, insert, select
from sqlalchemy import text as sql
from sqlalchemy.exc import OperationalError
from support.control import Running, make_key, until

from corral.control import audit as trail
from corral.control.audit import NOTES_MAX, Notes
from corral.control.auth import ROUTE_MAX, Principal
from corral.store.database import Database, resolve
from corral.store.tables import audit, keys

ONE = Principal("abc", "admin", "10.1.2.4", "")


@pytest.fixture
def database(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setattr(trail, "MINUTE", 1e9)  # no test goes over the end of one
    made = Database(resolve(database_url, tmp_path))
    made.migrate()
    yield made
    made.close()


def read(notes: Notes, *queries: str, who: Principal = ONE, route: str = "/admin/audit") -> None:
    async def ask() -> None:
        for query in queries:
            assert await notes.note(who, "GET", route, 200, query)

    asyncio.run(ask())


def recorded(database: Database) -> list[str]:
    """The queries on record, oldest first."""
    return [row["query"] for row in told(database)]


def told(database: Database) -> list[dict[str, Any]]:
    """What rows say besides, oldest first."""
    chosen = select(audit.c.after).order_by(audit.c.seq)
    return list(database.read_now(lambda c: c.execute(chosen).scalars().all()))


def test_no_look_at_texts_is_only_counted(database: Database) -> None:
    asked = [f"request=r{number}" for number in range(NOTES_MAX + 7)]
    read(Notes(database), *asked, route="/admin/audit/content")
    assert recorded(database) == asked, "a control that is killed now has lost none"


@pytest.mark.parametrize("page", ["limit={}", "after=5&limit={}", "after={}&after=7"])
def test_reads_of_the_trail_are_bounded_and_those_beyond_are_counted(database: Database, page: str) -> None:
    notes, asked = Notes(database), [page.format(number) for number in range(1, NOTES_MAX + 31)]
    read(notes, *asked[: NOTES_MAX + 1])
    assert recorded(database) == asked[: NOTES_MAX + 1]
    assert told(database)[NOTES_MAX:] == [{"query": asked[NOTES_MAX], "counting": True}], "more may come"
    read(notes, *asked[NOTES_MAX + 1 :])
    assert len(told(database)) == NOTES_MAX + 1
    other = Principal("abd", "operator", "10.1.2.4", "", "team")
    read(notes, "after=5", "after=6", who=other)
    asyncio.run(notes.flush())
    asyncio.run(notes.flush())
    assert told(database)[NOTES_MAX + 1 :] == [{"query": "after=5"}, {"more_read": 29}]
    read(notes, *asked)
    assert len(told(database)) == 2 * (NOTES_MAX + 1) + 2, "anew, each minute"


def test_other_reads_and_what_is_refused_leave_no_read_of_the_trail_without_a_row(database: Database) -> None:
    notes = Notes(database)
    read(notes, *["by=day"] * (NOTES_MAX + 5), route="/admin/usage")
    read(notes, "limit=7")
    assert told(database)[NOTES_MAX:] == [{"query": "limit=7"}]
    asyncio.run(notes.flush())
    assert told(database)[NOTES_MAX + 1 :] == [{"more_read": 5}]


def test_of_many_reads_at_once_none_is_answered_before_the_row_that_tells_of_it(database: Database) -> None:
    notes = Notes(database)

    async def one(number: int) -> list[dict[str, Any]]:
        assert await notes.note(ONE, "GET", "/admin/audit", 200, f"limit={number}")
        return told(database)  # in this very moment

    async def crowd() -> list[list[dict[str, Any]]]:
        return await asyncio.gather(*(one(number) for number in range(NOTES_MAX + 60)))

    seen = asyncio.run(crowd())
    assert len(told(database)) == NOTES_MAX + 1
    for number, rows in enumerate(seen):
        assert any(row.get("counting") or row["query"] == f"limit={number}" for row in rows), number


def test_no_read_of_the_trail_is_only_counted_while_no_row_is_taken(tmp_path: Path) -> None:
    database = Database(resolve("sqlite:///corral.db", tmp_path))
    database.migrate()
    notes = Notes(database)
    refuse = "CREATE TRIGGER refuse BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no record'); END"

    async def ask(times: int) -> list[bool]:
        return [await notes.note(ONE, "GET", "/admin/audit", 200, f"limit={number + 1}") for number in range(times)]

    async def all_of_it() -> None:
        assert all(await ask(NOTES_MAX))
        database.write_now(lambda c: c.execute(sql(refuse)))
        assert not any(await ask(5)), "nothing is shown"
        database.write_now(lambda c: c.execute(sql("DROP TRIGGER refuse")))
        assert all(await ask(3))
        database.write_now(lambda c: c.execute(sql(refuse)))
        await notes.flush()
        assert not any(await ask(2))
        database.write_now(lambda c: c.execute(sql("DROP TRIGGER refuse")))
        assert all(await ask(4))
        database.write_now(lambda c: c.execute(sql(refuse)))
        other = Principal("abd", "admin", "10.1.2.4", "")
        assert not await notes.note(other, "GET", "/admin/keys", 200), "so the count may not be taken either"
        assert not any(await ask(3))
        database.write_now(lambda c: c.execute(sql("DROP TRIGGER refuse")))
        await notes.flush()

    asyncio.run(all_of_it())
    rows = told(database)
    database.close()
    counted = sum(row.get("more_read", 0) for row in rows)
    assert sum("query" in row for row in rows) + counted == NOTES_MAX + 3 + 4
    assert counted == 2 + 3


def test_a_loop_of_an_operator_does_not_fill_the_database(control: Running) -> None:
    operator = make_key(control, role="operator")
    with control.client(operator["key"]) as client:
        for number in range(4 * NOTES_MAX):
            client.get("/admin/audit", params={"limit": number + 1}).raise_for_status()
    rows = control.admin.get("/admin/audit", params={"limit": 1000, "key": operator["id"]}).json()["audit"]
    # The loop may have gone over the end of a minute, as calls count it and as counts are entered.
    assert NOTES_MAX < len(rows) <= 3 * (NOTES_MAX + 2)
    assert any((row["after"] or {}).get("counting") for row in rows)


def test_the_pages_of_a_run_have_one_row_that_says_where_it_began(database: Database) -> None:
    notes = Notes(database)
    pages = [f"since=1h&after={1000 * number}&limit=1000" for number in range(50)]
    read(notes, *pages)
    assert recorded(database) == pages[:1]
    asyncio.run(notes.flush())
    assert recorded(database) == pages[:1], "nothing is left to count"


LONG = "&key=k&x=" + "x" * ROUTE_MAX


@pytest.mark.parametrize(
    ("first", "other", "rows"),
    [
        ("after=5&key=k", "after=4&key=k", 1),  # before where the run began
        ("after=5&key=k", "after=6&key=l", 1),
        ("after=5&key=k", "after=6&key=k&limit=5", 1),
        ("key=k", "after=6&key=k", 1),  # without a place the newest are shown
        ("after=5&key=k", "key=k", 2),
        ("after=5&key=k", "after=-6&key=k", 1),
        ("after=5&x=", "after=4&x=&after=6", 2),  # the last one may be the end of another value
        (f"after=5{LONG}", f"after=6{LONG}", 2),  # its end is not known
    ],
)
def test_what_a_run_does_not_cover_has_its_own_row(database: Database, first: str, other: str, rows: int) -> None:
    """Of two reads: the second is covered by the row of the first where that can begin a run."""
    first, other = first[:ROUTE_MAX], other[:ROUTE_MAX]
    read(Notes(database), first, other, other)
    assert recorded(database) == [first, *[other] * rows]


def test_a_run_is_of_one_caller_at_one_place_and_of_one_minute(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes(database)
    for who in (ONE, Principal("abc", "admin", "10.9.9.9", ""), Principal("abd", "admin", "10.1.2.4", "")):
        read(notes, "after=5", "after=6", who=who)
    read(notes, "after=5", "after=6", route="/admin/audit/records")
    assert recorded(database) == ["after=5"] * 4
    monkeypatch.setattr(trail, "MINUTE", 1e-9)
    read(notes, "after=7")
    assert recorded(database)[4:] == ["after=7"]


def test_a_run_whose_row_was_not_taken_has_not_begun(tmp_path: Path) -> None:
    database = Database(resolve("sqlite:///corral.db", tmp_path))
    database.migrate()
    notes = Notes(database)
    refuse = "CREATE TRIGGER refuse BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no record'); END"
    database.write_now(lambda c: c.execute(sql(refuse)))
    assert not asyncio.run(notes.note(ONE, "GET", "/admin/audit", 200, "after=5"))
    database.write_now(lambda c: c.execute(sql("DROP TRIGGER refuse")))
    read(notes, "after=5")
    assert recorded(database) == ["after=5"]
    database.close()


# -- when a key was last used


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trail, "MINUTE", 0.2)


@pytest.mark.parametrize("role", ["operator", "admin"])
def test_the_use_of_an_administrators_key_is_seen(quick: None, control: Running, role: str) -> None:
    made, idle = make_key(control, role=role), make_key(control, role=role)

    def used(key: dict[str, Any]) -> float | None:
        shown = control.admin.get(f"/admin/keys/{key['id']}").json()["last_used"]
        return None if shown is None else float(shown)

    assert used(made) is None
    with control.client(made["key"]) as client:
        client.get("/admin/status").raise_for_status()
        first = until("that it was used", lambda: used(made))
        client.get("/admin/nodes").raise_for_status()
        until("that it was used again", lambda: (used(made) or 0.0) > first)
    control.admin.post(f"/admin/keys/{idle['id']}/revoke").raise_for_status()
    with control.client(idle["key"]) as client:
        assert client.get("/admin/status").status_code == 401
    until("later uses of another one", lambda: used({"id": "admin"}))
    assert used(idle) is None


def test_a_crowd_of_calls_is_one_write_and_none_that_fails_is_lost(database: Database) -> None:
    row = {"id": "k", "name": "n", "tenant": "t", "role": "admin", "models": ["*"], "class": "batch", "created": 1.5}
    database.write_now(lambda c: c.execute(insert(keys).values(row)))
    notes, statements, away = Notes(database), [], True

    def executes(*call: Any) -> None:
        if "UPDATE keys" in call[2]:
            statements.append(call[2])
            if away:
                raise OperationalError("UPDATE keys", {}, Exception("away"))

    event.listen(database.engine, "before_cursor_execute", executes)
    for _ in range(100):
        notes.used("k")
    asyncio.run(notes.flush())
    away = False
    assert len(statements) == 1
    asyncio.run(notes.flush())
    asyncio.run(notes.flush())
    assert len(statements) == 2
    assert database.read_now(lambda c: c.execute(select(keys.c.last_used)).scalar_one()) > 1.5
