"""Reads of the audit trail: what they find, and that none reads the table from end to end, on both databases."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection, insert, text
from support.plans import BEGIN, MANY, explained, fill, many, row, seen

from corral.control import audit as lists
from corral.control import measure, record, spent
from corral.control.auth import Principal
from corral.control.errors import Problem
from corral.control.snapshot import _altered
from corral.store import seal, trail
from corral.store.content import Hashes
from corral.store.database import Database
from corral.store.tables import (
    audit,
    audit_streams,
)
from corral.store.trail import Wanted, listed

ADMIN = Principal("a", "admin", "::1", "")
OPERATOR = Principal("o", "operator", "::1", "", "team-1")


# -- what they find


def jumbled(count: int) -> list[dict[str, Any]]:
    """Rows whose times nearly go up: some gateways ship late, and some have wrong clocks."""
    drawn = random.Random(1)
    late = [drawn.choice([0.0] * 8 + [-40.0, 1e9]) for _ in range(count)]
    return [row(number, BEGIN + number + drawn.random() + late[number]) for number in range(count)]


def expected(rows: list[dict[str, Any]], wanted: Wanted, limit: int) -> list[str]:
    """The ids of what is asked for, by looking at each row."""
    found = []
    for seq, one in enumerate(rows, 1):
        number = (wanted.after is None or seq > wanted.after) and (wanted.below is None or seq < wanted.below)
        ts = one["ts"]
        time = (wanted.since is None or ts >= wanted.since) and (wanted.until is None or ts < wanted.until)
        key = wanted.keys is None or one["key"] in wanted.keys
        others = ("tenant", wanted.tenant), ("model", wanted.model), ("request_id", wanted.request)
        if number and time and key and all(value in (None, one[name]) for name, value in others):
            found.append(one["id"])
    return found[:limit] if wanted.after is not None else found[-limit:]


@pytest.mark.parametrize("window", [1, 20, 10_000])
def test_each_filter_finds_what_a_look_at_each_row_finds(
    database: Database, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(trail, "WINDOW", window)
    rows = jumbled(300)
    database.write_now(fill, rows)
    drawn = random.Random(window)

    def some(*values: Any) -> Any:
        return drawn.choice([None, None, *values])

    def ask(connection: Connection) -> int:
        count = 0
        for _ in range(300):
            at = BEGIN + drawn.randrange(-50, 350)
            wanted = Wanted(
                after=some(0, 3, 150, 299),
                below=some(1, 100, 301),
                since=some(at, at, 1e9 + BEGIN, 1e12),
                until=some(at + 60, BEGIN, 1e12),
                keys=some(["key-1"], ["key-1", "key-2", "nobody"]),
                tenant=some("team-1", "nobody"),
                model=some("model-2"),
                request=some("request-17") if drawn.random() < 0.2 else None,
            )
            limit = drawn.choice([1, 5, 1000])
            found = [one["id"] for one in listed(connection, wanted, limit)]
            assert found == expected(rows, wanted, limit), (wanted, limit)
            count += bool(found)
        return count

    assert database.read_now(ask) > 50


def test_an_export_since_a_time_has_each_record_once_and_looks_for_its_begin_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = jumbled(300)
    database.write_now(fill, rows)
    since = BEGIN + 200
    looked: list[float | None] = []
    numbers = trail.numbers

    def noted(connection: Connection, *between: float | None) -> tuple[int, int] | None:
        looked.append(between[0])
        return numbers(connection, *between)

    monkeypatch.setattr(trail, "numbers", noted)
    found: list[str] = []
    after: int | None = 0
    while page := database.read_now(listed, Wanted(after=after, since=since), 10):
        found += [one["id"] for one in page]
        after = page[-1]["seq"]
    assert found == [one["id"] for one in rows if one["ts"] >= since]
    assert looked == [since]


@pytest.mark.parametrize(("window", "looks"), [(1, 1), (10_000, 0)])
@pytest.mark.parametrize("after", [None, 0])
def test_where_a_time_begins_is_looked_for_once_and_not_for_keys_with_few_records(
    database: Database, monkeypatch: pytest.MonkeyPatch, window: int, looks: int, after: int | None
) -> None:
    monkeypatch.setattr(trail, "WINDOW", window)
    rows = jumbled(300)
    database.write_now(fill, rows)
    looked: list[Any] = []
    numbers = trail.numbers

    def noted(*given: Any) -> tuple[int, int] | None:
        looked.append(given)
        return numbers(*given)

    monkeypatch.setattr(trail, "numbers", noted)
    wanted = Wanted(after=after, since=BEGIN + 100, keys=["key-1", "key-2", "key-3", "nobody"])
    found = [one["id"] for one in database.read_now(listed, wanted, 1000)]
    assert found == expected(rows, wanted, 1000)
    assert len(looked) == looks


# -- how they find it


@pytest.fixture
def filled(database: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.setattr(trail, "WINDOW", 100)
    many(database)
    return database


TEXTS = record.Texts(request="request-5", prompt=["00" * 32])
HASHES = Hashes(b"x" * 32)
AT = BEGIN + MANY - 200
OLD = BEGIN + 5
RARE = ["key-rare", "nobody", "no one", "none"]

READS: dict[str, Callable[[Connection], Any]] = {
    "verify's first call": seal.state,
    "a page of verify": lambda c: seal.records(c, "gateway-1", 3000, 10),
    "list --request": lambda c: listed(c, Wanted(request="request-5"), 100),
    "list --request, of a tenant, a key, a model": lambda c: listed(
        c, Wanted(request="request-5", keys=["key-5"], tenant="team-1", model="model-0", since=1.0), 100
    ),
    "list --key": lambda c: listed(c, Wanted(keys=["key-5"]), 100),
    "list --key, of three of a name": lambda c: listed(c, Wanted(keys=["key-4", "key-5", "key-6"]), 100),
    "list --key, which has used none for long": lambda c: listed(c, Wanted(keys=["key-once"]), 100),
    "list --key, of a tenant": lambda c: listed(c, Wanted(keys=["key-5"], tenant="team-1"), 100),
    "list of a tenant": lambda c: listed(c, Wanted(tenant="team-1"), 100),
    "list --model": lambda c: listed(c, Wanted(model="model-1"), 100),
    "list --since": lambda c: listed(c, Wanted(since=AT), 100),
    "list --since, none": lambda c: listed(c, Wanted(since=1e12), 1000),
    "list --since --key": lambda c: listed(c, Wanted(since=AT, keys=["key-5"]), 100),
    "list --since, of long ago, --key of few records": lambda c: listed(c, Wanted(since=OLD, keys=["key-rare"]), 100),
    "list --since, of long ago, --key of a name of four": lambda c: listed(c, Wanted(since=OLD, keys=RARE), 100),
    "export --since, of long ago, --key": lambda c: listed(c, Wanted(after=0, since=OLD, keys=RARE), 100),
    "whether a key has few, which has used none for long": lambda c: trail._few(c, audit.c.key, "key-once"),
    "list before a late time": lambda c: listed(c, Wanted(until=AT), 100),
    "list before a late time, --key": lambda c: listed(c, Wanted(until=AT, keys=RARE), 100),
    "list before the middle, --key": lambda c: listed(c, Wanted(until=BEGIN + MANY / 2, keys=RARE), 100),
    "list before a time": lambda c: listed(c, Wanted(until=BEGIN + 100), 100),
    "export --since, the first page": lambda c: listed(c, Wanted(after=0, since=AT), 100),
    "export --since, the next page": lambda c: listed(c, Wanted(after=MANY - 100, since=AT), 100),
    "compare": lambda c: record._compare(c, ADMIN, TEXTS, HASHES),
    "compare, of a tenant": lambda c: record._compare(c, OPERATOR, TEXTS, HASHES),
    "content": lambda c: record.texts_of(c, "request-10"),
    "a key by its name": lambda c: lists.of_key(c, ADMIN, "same"),
    "a key that only records know": lambda c: lists.of_key(c, OPERATOR, "key-5"),
    "what was used on a day": lambda c: spent._sums(c, AT, AT + 50),
    "metrics": measure._statistics,
    "what another control changed": lambda c: _altered(c, 5),
}


def test_no_read_goes_over_the_whole_table(filled: Database) -> None:
    found: dict[str, list[str]] = {}
    for what, read in READS.items():
        with explained(filled) as looked:
            filled.read_now(read)
        found[what] = seen(looked)
    assert {what: steps for what, steps in found.items() if steps} == {}


def test_before_a_time_the_shorter_side_of_it_is_read(filled: Database) -> None:
    until = BEGIN + MANY * 0.7
    with explained(filled) as before:
        filled.read_now(trail.numbers, None, until)
    with explained(filled) as looked:
        rows = filled.read_now(listed, Wanted(until=until), 100)
    assert [one["ts"] for one in rows] == [until - 100 + number for number in range(100)]
    assert looked.work < before.work / 2


def test_records_older_than_the_chain_are_counted_in_one_pass(filled: Database) -> None:
    def move(connection: Connection) -> None:
        connection.execute(text("UPDATE audit SET pos = NULL, leaf = NULL"))
        head = {"stream": "", "pos": MANY - 5, "link": b"", "signed": 0, "signed_link": b"", "dropped": 0}
        connection.execute(insert(audit_streams), [head])

    filled.write_now(move)
    with explained(filled) as looked:
        state = filled.read_now(seal.state)
    assert (state.older, state.outside) == (MANY - 5, 5)
    # An instruction for each step of one: to go on, three columns, whether it counts as which, and both counts.
    assert sum(looked.works) < MANY * (14 if filled.dialect == "sqlite" else 1.5)


def test_what_is_unknown_is_told_without_a_look_at_the_whole_table(filled: Database) -> None:
    unknown = record.Texts(request="nobody", prompt=["00" * 32])
    with explained(filled) as looked, pytest.raises(Problem, match="there is no record of a request 'nobody'"):
        filled.read_now(record._compare, OPERATOR, unknown, HASHES)
    assert seen(looked) == []


@pytest.mark.parametrize("where", ["node = 'x'", "gw > ''"])
def test_a_look_at_each_row_would_be_seen(filled: Database, where: str) -> None:
    """What the tests above go by."""
    with explained(filled) as looked:
        filled.read_now(lambda c: c.execute(text(f"SELECT count(gw) FROM audit WHERE {where}")).all())
    assert seen(looked) != []
