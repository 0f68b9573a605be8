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
    chosen = select(audit.c.after).order_by(audit.c.seq)
    return [after["query"] for after in database.read_now(lambda c: c.execute(chosen).scalars().all())]


@pytest.mark.parametrize("route", ["/admin/audit", "/admin/audit/content"])
def test_no_read_of_the_trail_is_only_counted(database: Database, route: str) -> None:
    asked = [f"request=r{number}" for number in range(NOTES_MAX + 7)]
    read(Notes(database), *asked, route=route)
    assert recorded(database) == asked, "a control that is killed now has lost none"


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
        ("after=5&key=k", "after=-6&key=k", 2),
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
