"""Requests that nobody settled, as their gateway was killed: settled at their last progress, marked `estimated`.

A gateway's first record says that it began, and comes to control after all that it (or one of its name) had written
before: what is open then will not be settled by it. The edge may have replayed such a request to another gateway,
whose record is waited for (GRACE). A gateway that never comes back and whose spool nobody adopts is given up after
GONE.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, delete, func, select

from corral.store.ingest import complete
from corral.store.tables import audit, spool_begun, spool_watermarks

GRACE = 15.0
GONE = 86400.0
BATCH = 1000
INTERRUPTED = "interrupted"


def recover(connection: Connection, now: float, longest: float) -> int:
    """Settle a batch of what nobody will settle; how many. `longest`: seconds that a request may take.

    Raises:
        SQLAlchemyError: nothing was changed.
    """
    begins = spool_begun.c
    for gateway, seq in connection.execute(
        select(begins.gateway, begins.seq).where(begins.since < now - GRACE).order_by(begins.gateway)
    ).all():
        count = _settle(connection, gateway, audit.c.seq <= seq)
        if count:
            return count
        connection.execute(delete(spool_begun).where((begins.gateway == gateway) & (begins.seq == seq)))
    for gateway in _silent(connection, now):
        count = _settle(connection, gateway, audit.c.ts < now - longest - GONE)
        if count:
            return count
    return 0


def _silent(connection: Connection, now: float) -> list[str]:
    """Gateways that have shipped nothing for GONE."""
    mark = spool_watermarks.c
    last = select(mark.gateway).group_by(mark.gateway).having(func.max(mark.updated) < now - GONE)
    return sorted(name for (name,) in connection.execute(last))


def _settle(connection: Connection, gateway: str, which: ColumnElement[bool]) -> int:
    still = (audit.c.gw == gateway) & audit.c.pos.is_(None) & audit.c.outcome.is_(None)
    found = connection.execute(select(audit).where(still, which).order_by(audit.c.seq).limit(BATCH)).mappings()
    rows = []
    for row in found.all():
        values = {name: row[name] for name in row if name not in ("seq", "pos", "leaf", "before", "after")}
        rows.append(values | {"outcome": INTERRUPTED, "estimated": True})
    return len(complete(connection, gateway, rows))
