"""Reads of the audit trail by what somebody looks for. Each goes by an index: none reads the table from end to end.

Rows are shown in the order of their numbers, which nearly is that of their times: a gateway that was cut off ships
late, and its clock may be wrong. So a time says at which number to begin, and each row is held to it besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, func, select, tuple_

from corral.store.tables import audit

WINDOW = 10_000
"""Of the newest so many numbers it is seen first whether they have all rows that are asked for; and all rows of a key,
a tenant or a model are looked at where they are no more."""

LAST = 2**63 - 1

_SHOWN = [one for one in audit.columns if one.name != "leaf"]


Between = Callable[[], tuple[int, int] | None]
"""Tells between which numbers the rows of the wanted time are, as `numbers` does."""


class Wanted(NamedTuple):
    """Which rows: None is any. ``after`` and ``below`` are numbers (both excluded), ``since`` (included) and ``until``
    epoch seconds, ``keys`` the ids of one key or several."""

    after: int | None = None
    below: int | None = None
    since: float | None = None
    until: float | None = None
    keys: Sequence[str] | None = None
    tenant: str | None = None
    model: str | None = None
    request: str | None = None


def _apart(column: ColumnElement[str]) -> ColumnElement[str]:
    """A text column that is compared, and not looked up: another one says where to look."""
    return column + ""


def listed(connection: Connection, wanted: Wanted, limit: int) -> list[dict[str, Any]]:
    """The newest `limit` rows, or those next behind `after`, in the order of their numbers."""
    found: list[dict[str, Any]] = []
    # Each key's rows are between the same numbers.
    between = cache(lambda: numbers(connection, wanted.since, wanted.until))
    for key in wanted.keys if wanted.keys is not None else (None,):
        # One after the other: of several at once a database would sort all rows.
        found += _of_key(connection, wanted, key, limit, between)
        found.sort(key=lambda row: row["seq"])
        found = found[:limit] if wanted.after is not None else found[-limit:]
    return found


def named(request: str, tenant: str | None = None) -> ColumnElement[bool]:
    """Records of a request by its `X-Request-ID`, or the one of that id; those of a tenant, or of any."""
    which = (audit.c.id == request) | (audit.c.request_id == request)
    return which if tenant is None else which & (_apart(audit.c.tenant) == tenant)


def numbers(connection: Connection, since: float | None, until: float | None) -> tuple[int, int] | None:
    """The lowest and the highest number of the rows from a time to before another, None where there are none: reads the
    index of times from the one to the other."""
    column = audit.c
    within = [] if since is None else [column.ts >= since]
    within += [] if until is None else [column.ts < until]
    # Of the bare number a database may look from the lowest on for one that is new enough.
    number = column.seq + 0
    low, high = connection.execute(select(func.min(number), func.max(number)).where(*within)).one()
    return None if low is None else (low, high)


def _of_key(
    connection: Connection, wanted: Wanted, key: str | None, limit: int, between: Between
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for low, high in _ranges(connection, wanted, key, between):
        statement = _statement(connection, wanted, key, low, high).limit(limit)
        found = [dict(row) for row in connection.execute(statement).mappings()]
        if len(found) == limit:
            break
    return found


def _given(wanted: Wanted, key: str | None) -> list[tuple[ColumnElement[Any], str]]:
    """What a row has to have: it is looked up by the first, and compared with the others."""
    column = audit.c
    by = (column.request_id, wanted.request), (column.key, key), (column.tenant, wanted.tenant)
    return [(one, value) for one, value in (*by, (column.model, wanted.model)) if value is not None]


def _looked_up(
    connection: Connection, first: ColumnElement[Any], value: str, low: int, high: int
) -> tuple[list[ColumnElement[bool]], list[ColumnElement[Any]]]:
    """Condition and order of the rows that have a value, from a number to another, by the index of both."""
    seq = audit.c.seq
    if connection.dialect.name == "postgresql":
        # The index of the pair is the only one of this order: PostgreSQL may take a key that was busy once for one that
        # is found among the newest rows, and look through all that came since.
        pair = tuple_(first, seq)
        return [pair >= tuple_(value, low), pair <= tuple_(value, high)], [first, seq]
    # SQLite takes of a pair its first half alone, and without the other it reads all rows of a key.
    return [first == value, seq.between(low, high)], [seq]


def _statement(connection: Connection, wanted: Wanted, key: str | None, low: int, high: int) -> Select[Any]:
    column = audit.c
    where: list[ColumnElement[bool]] = []
    # Compared, not looked up: by the index of times each page of an export would sort all that is to come.
    if wanted.since is not None:
        where.append(column.ts + 0.0 >= wanted.since)
    if wanted.until is not None:
        where.append(column.ts + 0.0 < wanted.until)
    if wanted.after is not None:
        where.append(column.seq > wanted.after)
        low = max(low, min(wanted.after, LAST))
    if wanted.below is not None:
        where.append(column.seq < wanted.below)
        high = min(high, max(wanted.below, -LAST))
    order: list[ColumnElement[Any]] = [column.seq]
    if given := _given(wanted, key):
        (first, value), *others = given
        found, order = _looked_up(connection, first, value, low, high)
        where += found
        where += [_apart(one) == compared for one, compared in others]
    else:
        where.append(column.seq.between(low, high))
    ordered = order if wanted.after is not None else [one.desc() for one in order]
    return select(*_SHOWN).where(*where).order_by(*ordered)


def _ranges(connection: Connection, wanted: Wanted, key: str | None, between: Between) -> Iterator[tuple[int, int]]:
    """Between which numbers to look: a range, and the next one where the first had not enough."""
    column = audit.c
    if wanted.request is not None or (wanted.since is None and (wanted.until is None or wanted.after is not None)):
        yield -LAST, LAST
        return
    if wanted.after is None:
        newest = wanted.below or connection.execute(select(func.max(column.seq))).scalar() or 0
        if wanted.since is None and wanted.until is not None:
            if _late(connection, wanted.until, newest):
                yield -LAST, newest
                return
        else:
            yield newest - WINDOW, newest
    else:
        ts = connection.execute(select(column.ts).where(column.seq == wanted.after)).scalar()
        if ts is not None and wanted.since is not None and ts >= wanted.since:  # a page before ended with it
            yield -LAST, LAST
            return
    given = _given(wanted, key)
    if given and _few(connection, *given[0]):
        yield -LAST, LAST
    elif (found := between()) is not None:
        yield found


def _few(connection: Connection, which: ColumnElement[Any], value: str) -> bool:
    """Whether so few rows have it that a look at each is less than one at the index of times may be."""
    where, order = _looked_up(connection, which, value, -LAST, LAST)
    some = select(audit.c.seq).where(*where).order_by(*order).offset(WINDOW).limit(1)
    return connection.execute(some).first() is None


def _late(connection: Connection, until: float, newest: int) -> bool:
    """Whether fewer rows are behind a time than before it, as its place among the numbers tells."""
    column = audit.c
    last = select(column.seq).where(column.ts < until).order_by(column.ts.desc()).limit(1)
    at = connection.execute(last).scalar()
    lowest = connection.execute(select(func.min(column.seq))).scalar()
    return at is not None and lowest is not None and newest - at < at - lowest
