"""The lease of the leader among control processes: one row of the database, with a term that grows with each change."""

from __future__ import annotations

from sqlalchemy import Connection, case, or_, select, update

from corral.store.database import insert
from corral.store.tables import leases

LEADER = "leader"


def take(connection: Connection, holder: str, now: float, seconds: float, unrenewed: float | None = None) -> int | None:
    """Take the lease, or renew it, for so many seconds; the term, or None while another holds it.

    `now` is epoch seconds. Whoever takes over what another held has a greater term than all before. `unrenewed`: the
    end that it has had for as long as it lasts, which is over then, whatever the clock of its holder said.
    """
    first = {"name": LEADER, "holder": holder, "term": 0, "until": 0.0}
    connection.execute(insert(connection, leases).values(first).on_conflict_do_nothing())
    known = leases.c
    term = case((known.holder == holder, known.term), else_=known.term + 1)
    # The first term is 1.
    term = case((known.term == 0, 1), else_=term)
    over = known.until <= now if unrenewed is None else or_(known.until <= now, known.until == unrenewed)
    mine = known.name == LEADER, or_(known.holder == holder, over)
    taken = connection.execute(update(leases).where(*mine).values(holder=holder, until=now + seconds, term=term))
    if not taken.rowcount:
        return None
    return int(connection.execute(select(known.term).where(known.name == LEADER)).scalar_one())


def until(connection: Connection) -> float | None:
    """When the lease ends, by its holder's clock; None before the first one."""
    return connection.execute(select(leases.c.until).where(leases.c.name == LEADER)).scalar_one_or_none()


def give_up(connection: Connection, holder: str) -> None:
    """Let another have it at once."""
    connection.execute(update(leases).where(leases.c.name == LEADER, leases.c.holder == holder).values(until=0.0))
