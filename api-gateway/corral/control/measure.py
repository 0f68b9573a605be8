"""Cheap questions to the database for its metrics. A database that is away or slow is None, never an error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, case, func, select, text
from sqlalchemy.exc import SQLAlchemyError

from corral.store.database import Database, DatabaseError
from corral.store.tables import audit, keys

TIMEOUT = 5.0

T = TypeVar("T")

_open: dict[tuple[int, str], asyncio.Future[Any]] = {}
"""Questions that have no answer yet, by database and kind."""


@dataclass(frozen=True)
class Statistics:
    """Bytes, counts, rows by table; None: this kind of database has no such thing."""

    size: int
    connections: int | None
    connections_max: int | None
    transactions: int | None
    rows: dict[str, int]


async def keys_by_state(database: Database) -> dict[str, int] | None:
    """How many keys are active, expired and revoked."""
    return await _ask(database, _keys)


async def database(database: Database) -> Statistics | None:
    """What the database says of itself."""
    return await _ask(database, _statistics)


async def _ask(database: Database, question: Callable[[Connection], T]) -> T | None:
    # A database that hangs holds a thread for each question: there is one of a kind at most, whoever asks.
    key = (id(database), question.__name__)
    task = _open.get(key)
    if task is None:
        task = _open[key] = asyncio.ensure_future(database.read(question))
        task.add_done_callback(lambda done: _close(key, done))
    await asyncio.wait({task}, timeout=TIMEOUT)
    if not task.done() or task.cancelled():
        return None
    error = task.exception()
    if error is None:
        result: T = task.result()
        return result
    if isinstance(error, DatabaseError | SQLAlchemyError | OSError):
        return None
    raise error


def _close(key: tuple[int, str], done: asyncio.Future[Any]) -> None:
    _open.pop(key, None)
    if not done.cancelled():
        done.exception()  # heard, even if nobody waits for it any more


def _keys(connection: Connection) -> dict[str, int]:
    state = case((keys.c.revoked.is_not(None), "revoked"), (keys.c.expires <= time.time(), "expired"), else_="active")
    counts = {str(name): int(count) for name, count in connection.execute(select(state, func.count()).group_by(state))}
    return {name: counts.get(name, 0) for name in ("active", "expired", "revoked")}


def _statistics(connection: Connection) -> Statistics:
    # Numbers go up by one and old rows are deleted first, so the span is the count but for gaps.
    # One by one: SQLite takes each from the table's end, and of both at once reads all of it.
    first, last = (select(end(audit.c.seq)).scalar_subquery() for end in (func.min, func.max))
    span = select(func.coalesce(last - first + 1, 0))
    rows = {
        "keys": connection.execute(select(func.count()).select_from(keys)).scalar_one(),
        "audit": connection.execute(span).scalar_one(),
    }
    if connection.dialect.name == "sqlite":
        pages = connection.execute(text("PRAGMA page_count")).scalar_one()
        return Statistics(pages * connection.execute(text("PRAGMA page_size")).scalar_one(), None, None, None, rows)
    row = connection.execute(
        text(
            "SELECT pg_database_size(datname), xact_commit + xact_rollback,"
            " (SELECT sum(numbackends) FROM pg_stat_database), current_setting('max_connections')"
            " FROM pg_stat_database WHERE datname = current_database()"
        )
    ).one()
    return Statistics(int(row[0]), int(row[2]), int(row[3]), int(row[1]), rows)
