"""Requests that nobody settled: settled at their last progress, marked `estimated`.

A gateway's first record says that it began, and comes to control after all that it (or one of its name) had written
before: what is open then will not be settled by that life. The edge may have replayed such a request to any gateway,
that one included: it is waited until each has shipped what it wrote until GRACE after, and what two have admitted is
open until both have begun anew. A gateway that never comes back and whose spool nobody adopts is given up, and not
waited for, after GONE.

A gateway that lives may have lost the end of one to a damaged spool: it is over when it has been here for as long as a
request may take, and every gateway has shipped what it wrote by then.
"""

from __future__ import annotations

import math
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, exists, func, or_, select, true

from corral.store.ingest import complete
from corral.store.progress import AHEAD
from corral.store.tables import audit, audit_holders, spool_begins, spool_watermarks, spools

GRACE = 15.0
"""Longer than the edge takes to replay a request (4 s) and a gateway to say what it has shipped (2 s) together."""

LATE = 60.0
"""Longer than a gateway takes to end what is past its time, and a replay of the edge to reach another one."""

GONE = 86400.0
KEPT = 30 * GONE
BATCH = 1000
INTERRUPTED = "interrupted"


Rows = list[dict[str, Any]]


def recover(connection: Connection, now: float, longest: float) -> Rows:
    """Settle a batch of what nobody will settle; the rows. `longest`: seconds that a request may take.

    Raises:
        SQLAlchemyError: nothing was changed.
    """
    # By each of the few holders, not by all that was ever settled.
    settled = exists().where(audit.c.id == audit_holders.c.id, audit.c.outcome.is_not(None))
    connection.execute(delete(audit_holders).where(settled))
    connection.execute(delete(spools).where(spools.c.heard < now - KEPT))
    begins = spool_begins.c
    known = spools.c.ended.is_(False) & (spools.c.heard >= now - GONE)
    # What is ahead of every clock says nothing.
    behind = (spools.c.shipped < begins.since + GRACE) | (spools.c.heard > now + AHEAD)
    ready = select(begins.gateway, begins.seq, begins.life).where(
        begins.since < now - GRACE, ~exists().where(known, behind)
    )
    for gateway, seq, life in connection.execute(ready.order_by(begins.gateway, begins.seq)).all():
        rows = _settle(connection, gateway, audit.c.seq <= seq, audit_holders.c.life < life)
        if rows:
            return rows
        connection.execute(delete(spool_begins).where((begins.gateway == gateway) & (begins.seq == seq)))
    for gateway in _silent(connection, now - GONE - longest):
        rows = _settle(connection, gateway, true(), true())
        if rows:
            return rows
    return []


def over(connection: Connection, now: float, longest: float) -> tuple[float, int]:
    """How long ago (seconds) a request was here that is over by now, so that its end is here too if it was written; and
    the number of the newest record. `longest`: seconds that a request may take."""
    last = connection.execute(select(func.max(audit.c.seq))).scalar() or 0
    known = spools.c.ended.is_(False) & (spools.c.heard >= now - GONE)
    shipped, heard = connection.execute(select(func.min(spools.c.shipped), func.max(spools.c.heard)).where(known)).one()
    if heard is not None and heard > now + AHEAD:  # what is ahead of every clock says nothing
        return math.inf, last
    return longest + LATE + (max(0.0, now - shipped) if shipped is not None else 0.0), last


def overdue(connection: Connection, now: float, longest: float, after: int, last: int) -> Rows:
    """Settle a batch of what was admitted by the records behind number `after` up to `last`, all of which are so old
    that it is over (`over`); the rows.

    What has run for much longer than `longest` by its gateway's own word is left: that one allows more than is known.
    """
    known = select(spools.c.gateway).where(or_(spools.c.ended, spools.c.heard >= now - GONE))
    column = audit.c
    # It is ended a moment after its time is over, and may have told of itself in that.
    ended = func.coalesce(column.ms, 0.0) <= (longest + LATE / 2) * 1e3
    for gateway in connection.execute(known.order_by(spools.c.gateway)).scalars().all():
        here = (column.gw == gateway) & (column.seq > after) & (column.seq <= last)
        rows = _complete(connection, gateway, here & ended)
        if rows:
            return rows
    return []


def _given_up(connection: Connection, gateway: str, lives: ColumnElement[bool]) -> Rows:
    """Settle what those lives of the gateway were the last to hold; the rows."""
    holder, rows = audit_holders.c, Rows()
    dead = (holder.gateway == gateway) & lives
    while ids := list(connection.execute(select(holder.id).where(dead).limit(BATCH)).scalars()):
        connection.execute(delete(audit_holders).where(dead, holder.id.in_(ids)))
        rows += _complete(connection, gateway, audit.c.id.in_(ids) & audit.c.id.not_in(select(holder.id)))
    return rows


def _silent(connection: Connection, since: float) -> list[str]:
    """Gateways that have shipped nothing since then, by control's clock: theirs may have been wrong by anything."""
    mark = spool_watermarks.c
    last = select(mark.gateway).group_by(mark.gateway).having(func.max(mark.updated) < since)
    return sorted(name for (name,) in connection.execute(last))


def _settle(connection: Connection, gateway: str, alone: ColumnElement[bool], lives: ColumnElement[bool]) -> Rows:
    """Settle a batch of what the gateway alone had or, where none is left, what those lives were the last to hold."""
    held = select(audit_holders.c.id)
    rows = _complete(connection, gateway, (audit.c.gw == gateway) & alone & audit.c.id.not_in(held))
    return rows or _given_up(connection, gateway, lives)


def _complete(connection: Connection, gateway: str, which: ColumnElement[bool]) -> Rows:
    still = audit.c.pos.is_(None) & audit.c.outcome.is_(None)
    found = connection.execute(select(audit).where(still, which).order_by(audit.c.seq).limit(BATCH)).mappings()
    rows = []
    for row in found.all():
        values = {name: row[name] for name in row if name not in ("seq", "pos", "leaf", "before", "after")}
        rows.append(values | {"outcome": INTERRUPTED, "estimated": True})
    return complete(connection, gateway, rows)
