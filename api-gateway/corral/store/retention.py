"""The end of audit rows: whole checkpoints go, oldest first, in small batches; their roots stay."""

from __future__ import annotations

from sqlalchemy import Connection, delete, func, select

from corral.store.actions import enter
from corral.store.chain import read_checkpoint
from corral.store.seal import last_older, newest
from corral.store.tables import audit, audit_checkpoints, audit_content, audit_streams
from corral.store.verify import TEXTS_DROPPED

BATCH = 5000
PAGE = 100


def due(connection: Connection, until: float) -> dict[str, int]:
    """By stream, up to which place its records may go: those of checkpoints made before `until` (epoch seconds).

    A stream that has nothing to lose is left out.
    """
    heads = connection.execute(select(audit_streams).where(audit_streams.c.stream != "")).all()
    known = {row.stream: row.dropped for row in heads if row.signed > row.dropped}
    found: dict[str, int] = {}
    # The newest checkpoint of that age says it for its streams; one that was silent then has it in an older one.
    column = audit_checkpoints.c
    below = connection.execute(select(func.max(column.number)).where(column.ts < until)).scalar() or 0
    while below > 0 and found.keys() < known.keys():
        lines = select(column.line).where(column.number.between(below - PAGE + 1, below))
        for line in connection.execute(lines.order_by(column.number.desc())).scalars().all():
            for span in read_checkpoint(line).checkpoint.streams:
                if span.stream in known:
                    found.setdefault(span.stream, span.last)
        below -= PAGE
    return {stream: last for stream, last in found.items() if last > known[stream]}


def drop_content(connection: Connection, until: float) -> int:
    """Delete a batch of prompts and answers older than `until` (epoch seconds); how many.

    That they go is a record of its own, or `verify` would miss them. ``ahead``: of records whose gateway's clock was.
    """
    column = audit_content.c
    aged = column.ts < until
    joined = audit_content.join(audit, audit.c.id == column.id, isouter=True)
    listed = select(column.id, audit.c.ts).select_from(joined).where(aged).order_by(column.ts, column.id).limit(BATCH)
    rows = connection.execute(listed).all()
    if rows:
        old = select(column.id).where(aged).order_by(column.ts, column.id).limit(BATCH)
        connection.execute(delete(audit_content).where(column.id.in_(old)))
        ahead = [row.id for row in rows if row.ts is not None and row.ts >= until]
        enter(connection, "DELETE", TEXTS_DROPPED, None, {"until": until, "texts": len(rows), "ahead": ahead})
    return len(rows)


def drop(connection: Connection, until: float) -> int:
    """Delete a batch of what may go; how many rows. Rows that are older than the chain go as it was signed of them."""
    column = audit.c
    signed = newest(connection)
    older = signed.checkpoint.older if signed is not None else None
    last, before = (older.last, older.until) if older is not None else (last_older(connection), 0.0)
    for stream, dropped in connection.execute(select(audit_streams.c.stream, audit_streams.c.dropped)).all():
        if stream:
            first = connection.execute(select(func.min(column.pos)).where(column.gw == stream)).scalar()
            if first is None or first > dropped:
                continue
            which = (column.gw == stream) & column.pos.between(first, min(first + BATCH - 1, dropped))
        else:
            free = ~column.seq.between(1, last) | (column.ts < before)
            old = select(column.seq).where(column.pos.is_(None), column.ts < until, free)
            which = column.seq.in_(old.order_by(column.ts).limit(BATCH))
        count = connection.execute(delete(audit).where(which)).rowcount
        if count:
            return count
    return 0
