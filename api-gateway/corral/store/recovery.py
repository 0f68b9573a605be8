"""Requests that nobody settled, as their gateway was killed: settled at their last progress, marked `estimated`.

A gateway's first record says that it began, and comes to control after all that it (or one of its name) had written
before: what is open then will not be settled by it. The edge may have replayed such a request to another gateway: it is
waited until each has shipped what it wrote until GRACE after. A gateway that never comes back and whose spool nobody
adopts is given up, and not waited for any more, after GONE.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, delete, exists, func, select

from corral.store.ingest import complete
from corral.store.tables import audit, spool_begun, spool_watermarks, spools

GRACE = 15.0
"""Longer than the edge takes to replay a request (4 s) and a gateway to say what it has shipped (2 s) together."""

GONE = 86400.0
BATCH = 1000
INTERRUPTED = "interrupted"


def recover(connection: Connection, now: float, longest: float) -> int:
    """Settle a batch of what nobody will settle; how many. `longest`: seconds that a request may take.

    Raises:
        SQLAlchemyError: nothing was changed.
    """
    begins = spool_begun.c
    other = (spools.c.gateway != begins.gateway) & spools.c.ended.is_(False) & (spools.c.shipped >= now - GONE)
    waited = exists().where(other, spools.c.shipped < begins.since + GRACE)
    ready = select(begins.gateway, begins.seq).where(begins.since < now - GRACE, ~waited)
    for gateway, seq in connection.execute(ready.order_by(begins.gateway)).all():
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
