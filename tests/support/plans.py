"""A trail of many records, and how a database finds what it is asked for in it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, event, insert, text

from corral.store.database import Database
from corral.store.tables import audit, audit_content, audit_streams, keys

GATEWAYS, KEYS, TEAMS, MODELS = 3, 7, 4, 5
MANY = 20_000
BEGIN = 1_000_000.0


def row(number: int, ts: float) -> dict[str, Any]:
    """A row as a gateway's, with something to look it up by."""
    place = {"gw": f"gateway-{number % GATEWAYS}", "pos": number // GATEWAYS + 1, "leaf": b"x" * 32}
    who = {"key": f"key-{number % KEYS}", "tenant": f"team-{number % TEAMS}", "model": f"model-{number % MODELS}"}
    return {"id": f"id-{number}", "request_id": f"request-{number}", "ts": ts, "api": "native", **place, **who}


def fill(connection: Connection, rows: list[dict[str, Any]]) -> None:
    connection.execute(insert(audit), [{"outcome": "ok", **one} for one in rows])


def many(database: Database) -> None:
    """Fill a database with MANY records, and have it count them."""

    def some(connection: Connection) -> None:
        rows = [row(number, BEGIN + number) for number in range(MANY)]
        # A key that was busy once: by what a database knows of it, it is found among the newest rows.
        rows = [one | {"key": "key-once"} if one["ts"] < BEGIN + MANY / 5 else one for one in rows]
        fill(connection, [one | {"key": "key-rare"} if number % 1000 == 7 else one for number, one in enumerate(rows)])
        named = [f"id-{number}" for number in range(0, MANY, 10)]
        connection.execute(insert(audit_content), [{"id": one, "ts": BEGIN, "data": b"x" * 500} for one in named])
        ends = {"pos": MANY // GATEWAYS, "link": b"", "signed": 0, "signed_link": b"", "dropped": 0}
        heads = [{"stream": f"gateway-{number}", **ends} for number in range(GATEWAYS)]
        connection.execute(insert(audit_streams), heads)
        who = {"name": "same", "tenant": "team-1", "role": "inference", "models": ["*"], "class": "batch"}
        some_keys = [{"id": f"key-{number}", **who, "created": 1.0} for number in range(KEYS)]
        connection.execute(insert(keys), some_keys)

    database.write_now(some)
    analyse(database)


def analyse(database: Database) -> None:
    """Have the database count what it has, where its plans go by that."""
    if database.dialect == "postgresql":
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))


@dataclass
class Looked:
    """What was asked, its plans, as lines, and what each of it has read: rows of PostgreSQL, instructions of SQLite, of
    which each row that is read takes several."""

    asked: list[str] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)
    works: list[int] = field(default_factory=list)

    @property
    def work(self) -> int:
        """The most that one has read."""
        return max(self.works, default=0)


@contextmanager
def explained(database: Database) -> Iterator[Looked]:
    """What each SELECT and DELETE takes that is done meanwhile; it is done again for that, and nothing is changed."""
    asked: list[tuple[str, Any]] = []
    looked = Looked()

    def note(_: Any, __: Any, statement: str, given: Any, *___: Any) -> None:
        if statement.startswith(("SELECT", "WITH", "DELETE")):
            asked.append((statement, given))

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        yield looked
    finally:
        event.remove(database.engine, "before_cursor_execute", note)
    looked.asked = [statement for statement, _ in asked]
    with database.engine.connect() as connection:
        for one in asked:
            (_of_sqlite if database.dialect == "sqlite" else _of_postgresql)(connection, looked, *one)


def _of_sqlite(connection: Connection, looked: Looked, statement: str, given: Any) -> None:
    looked.plans += [one[3] for one in connection.exec_driver_sql("EXPLAIN QUERY PLAN " + statement, given)]
    raw: Any = connection.connection.driver_connection
    counts = itertools.count()
    raw.set_progress_handler(lambda: next(counts) < 0, 1)
    result = connection.exec_driver_sql(statement, given)
    if result.returns_rows:
        result.all()
    raw.set_progress_handler(None, 0)
    looked.works.append(next(counts))


def _of_postgresql(connection: Connection, looked: Looked, statement: str, given: Any) -> None:
    (plan,) = connection.exec_driver_sql("EXPLAIN (ANALYZE, FORMAT JSON) " + statement, given).scalar_one()
    found = list(steps(plan["Plan"]))
    looked.plans += [one for one, _ in found]
    looked.works.append(sum(rows for _, rows in found))


def steps(plan: dict[str, Any], above: str = "") -> Iterator[tuple[str, int]]:
    """Each step of a plan that reads a table, and how many rows it has read. One without a condition on an index is
    called as SQLite calls it, but for who takes a table's first or last row."""
    # A DELETE's own step names its table too, and reads what those below it found.
    if ("Relation Name" in plan or "Index Name" in plan) and plan["Node Type"] != "ModifyTable":
        index, which = plan.get("Index Name", ""), plan.get("Index Cond")
        end = index and above == "Limit" and "Filter" not in plan
        how = "SEARCH" if which or end or plan["Node Type"] == "Bitmap Heap Scan" else "SCAN"
        read = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)
        yield f"{how} {plan.get('Relation Name', index)} USING INDEX {index} ({which})", read * plan["Actual Loops"]
    for one in plan.get("Plans", ()):
        yield from steps(one, plan["Node Type"])


def seen(looked: Looked) -> list[str]:
    """The steps that read the records, or their texts, or an index of them, from end to end; and how much was read
    where it is as much as that would be."""
    wide = [one for one in looked.plans if re.match(r"SCAN (audit|audit_content|(ix|uq|pk)_audit\w*)( |$)", one)]
    if looked.work >= MANY // 2:
        wide.append(f"{looked.work} read")
    return wide if looked.plans else ["nothing was asked"]
