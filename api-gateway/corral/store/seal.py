"""Sealing: audit rows that are complete get their place in the chain of their writer, in the caller's transaction.

The database lets one writer in at a time (store/database.py), so that a chain has one end.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from sqlalchemy import ColumnElement, CompoundSelect, Connection, Select, case, func, null, select

from corral.store import progress
from corral.store.chain import FIELDS, ZERO, Older, Signed, content, leaf_of, link_after, read_checkpoint
from corral.store.database import insert
from corral.store.tables import audit, audit_checkpoints, audit_content, audit_streams
from corral.store.verify import Head, State

TEXTS = 100
"""Texts that are read at once, of up to 700 KB each."""

_EMPTY = dict.fromkeys(FIELDS)
_PLACELESS = audit.c.outcome.is_not(None) & audit.c.pos.is_(None)


def seal(connection: Connection, stream: str, rows: Sequence[dict[str, Any]]) -> None:
    """Give each row ``gw``, ``pos`` and ``leaf``, in this order; it is the caller's to write them.

    A row lacks what is null in it.
    """
    if not rows:
        return
    heads = audit_streams.c
    head = connection.execute(select(heads.pos, heads.link).where(heads.stream == stream)).first()
    pos, link = (head.pos, head.link) if head is not None else (0, ZERO)
    for row in rows:
        pos += 1
        row["gw"], row["pos"] = stream, pos
        row["leaf"] = leaf = leaf_of(content(_EMPTY | row))
        link = link_after(link, leaf)
    statement = insert(connection, audit_streams)
    moved = {"pos": pos, "link": link}
    fresh = {"stream": stream, **moved, "signed": 0, "signed_link": ZERO, "dropped": 0}
    connection.execute(statement.values(fresh).on_conflict_do_update(index_elements=["stream"], set_=moved))


def state(connection: Connection) -> State:
    """The chains as they are, by the index of streams and places: what it reads besides their ends are requests that
    run and records that are in no chain, each of those that are older than it too."""
    heads = {row.stream: row for row in connection.execute(select(audit_streams)).all()}
    first = heads.pop("").pos if "" in heads else 0
    highest: dict[str, int] = {}
    older = outside = 0
    for name, most, below in connection.execute(ends()).all():
        complete, before = connection.execute(_placeless(name, first)).one()
        older += before
        outside += complete - before + below
        if most is None:
            continue
        if name in heads:
            highest[name] = most
        else:
            outside += max(most, 0)  # those below 1 are counted
    found = {name: Head(head.pos, head.link, head.signed, highest.get(name, 0)) for name, head in sorted(heads.items())}
    return State(found, outside, older, first)


def ends() -> CompoundSelect[Any]:
    """By ``gw``: the highest place, and how many rows have a place below 1."""
    column = audit.c
    # Each name is found behind the one before: a GROUP BY would read all rows.
    names = select(func.min(column.gw).label("gw")).cte("names", recursive=True)
    following = select(func.min(column.gw)).where(column.gw > names.c.gw).scalar_subquery()
    names = names.union_all(select(following).where(names.c.gw.is_not(None)))

    def of(gw: ColumnElement[bool]) -> list[ColumnElement[int]]:
        highest = select(func.max(column.pos)).where(gw, column.pos.is_not(None)).scalar_subquery()
        below = select(func.count()).select_from(audit).where(gw, column.pos < 1).scalar_subquery()
        return [highest, below]

    of_names = select(names.c.gw, *of(column.gw == names.c.gw)).where(names.c.gw.is_not(None))
    return of_names.union_all(select(null(), *of(column.gw.is_(None))))


def _placeless(gw: str | None, first: int) -> Select[int, int]:
    """How many rows of a gateway are complete without a place, and how many of them have a number up to `first`."""
    # Numbers below 1 are given by hand alone.
    old = func.coalesce(func.sum(case((audit.c.seq.between(1, first), 1), else_=0)), 0)
    return select(func.count(), old).select_from(audit).where(audit.c.gw == gw, _PLACELESS)


def records(connection: Connection, stream: str, after: int, limit: int) -> list[dict[str, Any]]:
    """Sealed records of a stream behind a place, in order: the fields that are hashed, ``leaf``, and ``kept``.

    ``kept`` is the SHA-256 of the text that is there of it, None where there is none. Those of the stream without a
    name are older than the chain: their place is their number, and they have no leaf.
    """
    if not stream:
        return _older(connection, after, limit)
    columns = [*(audit.c[name] for name in FIELDS), audit.c.leaf]
    wanted = select(*columns).where(audit.c.gw == stream, audit.c.pos > after).order_by(audit.c.pos).limit(limit)
    names = (*FIELDS, "leaf")
    return _with_texts(connection, [dict(zip(names, row, strict=True)) for row in connection.execute(wanted)])


def _older(connection: Connection, after: int, limit: int) -> list[dict[str, Any]]:
    column = audit.c
    columns = [column.seq if name == "pos" else column[name] for name in FIELDS]
    old = _PLACELESS & (column.seq > after) & (column.seq <= last_older(connection))
    names = (*FIELDS, "leaf")
    found = connection.execute(select(*columns).where(old).order_by(column.seq).limit(limit))
    return _with_texts(connection, [dict(zip(names, (*row, None), strict=True)) for row in found])


def last_older(connection: Connection) -> int:
    """Up to which number records are older than the chain, 0 where none is."""
    return connection.execute(select(audit_streams.c.pos).where(audit_streams.c.stream == "")).scalar() or 0


def has_older(connection: Connection, known: Older, until: float) -> bool:
    """Whether records older than the chain, as they were signed, are from before `until` (epoch seconds)."""
    column = audit.c
    found = _PLACELESS & column.seq.between(1, known.last) & (column.ts >= known.until) & (column.ts < until)
    return connection.execute(select(column.seq).where(found).limit(1)).first() is not None


def newest(connection: Connection) -> Signed | None:
    """The last checkpoint that the database has."""
    lines = select(audit_checkpoints.c.line).order_by(audit_checkpoints.c.number.desc()).limit(1)
    line = connection.execute(lines).scalar()
    return None if line is None else read_checkpoint(line)


def _with_texts(connection: Connection, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give each row ``kept``."""
    texts = _texts(connection, _kept(connection, [row["id"] for row in rows]))
    for row in rows:
        row["kept"] = texts.get(row["id"])
    return rows


def _kept(connection: Connection, ids: list[str]) -> list[str]:
    """Those of which there is a text."""
    column = audit_content.c.id
    if connection.execute(select(func.min(column))).scalar() is None:
        return []  # as where no key has them kept
    some = (select(column).where(column.in_(part)) for part in progress.pieces(ids))
    return [known for one in some for known in connection.execute(one).scalars()]


def _texts(connection: Connection, ids: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    column = audit_content.c
    for start in range(0, len(ids), TEXTS):
        some = select(column.id, column.data).where(column.id.in_(ids[start : start + TEXTS]))
        found.update((row.id, sha256(row.data).hexdigest()) for row in connection.execute(some))
    return found
