"""What a gateway records of requests that go on: that it began anew, and each second how far they are."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, func, select, update

from corral.store.clean import CLEAN
from corral.store.database import insert
from corral.store.tables import audit, spool_begun, spools

FIELDS = ("node", "attempts", "prompt_tokens", "tokens", "resp_bytes", "queue_ms", "ttft_ms", "ms")
"""What each row of a progress record has behind the request's id."""


class Shipped(NamedTuple):
    """All that a gateway wrote until `shipped` (epoch seconds) is here; ``ended``: it will write no more."""

    shipped: float
    ended: bool = False


def begun(connection: Connection, gateway: str, gone: bool) -> None:
    """The gateway began: what is open of it up to here is to be recovered. `gone`: another one says so in its place.

    Where it has begun a moment ago too, the wait begins anew for all: what was open only now may still be told.
    """
    last = connection.execute(select(func.max(audit.c.seq))).scalar() or 0
    now = time.time()
    statement = insert(connection, spool_begun).values(gateway=gateway, seq=last, since=now)
    connection.execute(statement.on_conflict_do_update(index_elements=["gateway"], set_={"seq": last, "since": now}))
    shipped(connection, {gateway: Shipped(now, gone)})


def shipped(connection: Connection, told: Mapping[str, Shipped]) -> None:
    """Note what gateways have shipped; what is known to be later stays."""
    if told:
        statement = insert(connection, spools)
        new = statement.excluded
        theirs = {"shipped": new.shipped, "ended": new.ended}
        later = spools.c.shipped < new.shipped
        rows = [{"gateway": name, **told[name]._asdict()} for name in sorted(told)]
        connection.execute(statement.on_conflict_do_update(index_elements=["gateway"], set_=theirs, where=later), rows)


def read(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The requests of a progress record by id; a malformed one is left out."""
    found = {}
    rows = record.get("rows")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, list) and len(row) == len(FIELDS) + 1 and isinstance(row[0], str):
            values = {f"new_{name}": CLEAN[name](value) for name, value in zip(FIELDS, row[1:], strict=True)}
            found[row[0]] = {"request": row[0], **values}
    return found


def note(connection: Connection, rows: list[dict[str, Any]]) -> None:
    """Write how far requests are that are still open."""
    if not rows:
        return
    still = (audit.c.id == bindparam("request")) & audit.c.outcome.is_(None)
    connection.execute(update(audit).where(still).values({name: bindparam(f"new_{name}") for name in FIELDS}), rows)
