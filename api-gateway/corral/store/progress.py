"""Requests that go on: that their gateway began anew, who may settle them, and each second how far they are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, func, select, update

from corral.store.clean import CLEAN
from corral.store.database import insert
from corral.store.tables import audit, audit_holders, spool_begins, spools

AHEAD = 60.0
"""Seconds by which clocks of controls may differ: what one of them wrote beyond is not believed."""

LOOK_UP = 1000

FIELDS = ("node", "attempts", "prompt_tokens", "tokens", "resp_bytes", "queue_ms", "ttft_ms", "ms")
"""What each row of a progress record has behind the request's id."""


def pieces(ids: list[str]) -> Iterator[list[str]]:
    """As many ids as are asked for at once, then the next ones."""
    for start in range(0, len(ids), LOOK_UP):
        yield ids[start : start + LOOK_UP]


class Shipped(NamedTuple):
    """All that a gateway wrote until ``shipped`` (epoch seconds) is here, as it said when it was last ``heard``;
    ``ended``: it will write no more."""

    shipped: float
    heard: float
    ended: bool = False


def begun(connection: Connection, gateway: str, at: float, gone: bool) -> None:
    """The gateway began `at` (epoch seconds): what is open of it up to here is to be recovered. `gone`: another one
    says so in its place.

    All that it had written by then is here, and no more than that: its record may have been long on its way.
    """
    last = connection.execute(select(func.max(audit.c.seq))).scalar() or 0
    now = time.time()
    written = min(at, now)
    spool = insert(connection, spools).values(gateway=gateway, life=1, shipped=written, heard=now, ended=gone)
    again = {"life": spools.c.life + 1, "shipped": written, "heard": now, "ended": gone}
    connection.execute(spool.on_conflict_do_update(index_elements=["gateway"], set_=again))
    life = connection.execute(select(spools.c.life).where(spools.c.gateway == gateway)).scalar_one()
    # One that begins again and again is not waited for anew each time: what was open then is the same.
    statement = insert(connection, spool_begins).values(gateway=gateway, seq=last, since=now, life=life)
    connection.execute(
        statement.on_conflict_do_update(index_elements=["gateway", "seq"], set_={"life": statement.excluded.life})
    )


def shipped(connection: Connection, told: Mapping[str, Shipped]) -> None:
    """Note what gateways have shipped. What is known to be later stays, unless no clock can have been there yet."""
    if told:
        statement = insert(connection, spools)
        new = statement.excluded
        theirs = {name: new[name] for name in ("shipped", "heard", "ended")}
        fresh = (spools.c.heard < new.heard) | (spools.c.heard > time.time() + AHEAD)
        rows = [{"gateway": name, "life": 0, **told[name]._asdict()} for name in sorted(told)]
        connection.execute(statement.on_conflict_do_update(index_elements=["gateway"], set_=theirs, where=fresh), rows)


def held(connection: Connection, gateway: str, ids: list[str]) -> None:
    """Of requests that this gateway has admitted: note who else may settle those that were open before.

    No clock tells which of two gateways the edge asked last: each may have it until it begins anew.
    """
    before = audit.c.gw != gateway
    own = select(func.max(spool_begins.c.seq)).where(spool_begins.c.gateway == gateway).scalar_subquery()
    found: list[Any] = []
    for some in pieces(ids):
        still = audit.c.id.in_(some) & audit.c.outcome.is_(None)
        wanted = select(audit.c.id, audit.c.gw, audit.c.seq).where(still, before | (audit.c.seq <= own))
        found += connection.execute(wanted).all()
    if not found:
        return
    lives = {row.gateway: row.life for row in connection.execute(select(spools.c.gateway, spools.c.life))}
    gone = select(spool_begins.c.gateway, func.max(spool_begins.c.seq).label("seq")).group_by(spool_begins.c.gateway)
    ended = {row.gateway: row.seq for row in connection.execute(gone)}
    holders = [{"id": row.id, "gateway": gateway, "life": lives.get(gateway, 0)} for row in found]
    for row in found:
        if row.gw != gateway and row.seq > ended.get(row.gw, -1):
            holders.append({"id": row.id, "gateway": row.gw, "life": lives.get(row.gw, 0)})
    statement = insert(connection, audit_holders)
    later = {"life": statement.excluded.life}
    connection.execute(statement.on_conflict_do_update(index_elements=["id", "gateway"], set_=later), holders)


def read(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The requests of a progress record by id; a malformed one is left out."""
    found = {}
    rows = record.get("rows")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, list) and len(row) == len(FIELDS) + 1 and isinstance(row[0], str):
            values = {f"new_{name}": CLEAN[name](value) for name, value in zip(FIELDS, row[1:], strict=True)}
            found[row[0]] = {"request": row[0], **values}
    return found


def later(row: Mapping[str, Any], before: Mapping[str, Any] | None) -> bool:
    """Whether a request is as far as it was known to be: what was rescued from a damaged segment comes late."""
    return before is None or (row["new_tokens"] or 0) >= (before["new_tokens"] or 0)


def note(connection: Connection, rows: list[dict[str, Any]]) -> None:
    """Write how far requests are that are still open, where that is as far as was known."""
    if not rows:
        return
    further = audit.c.tokens.is_(None) | (audit.c.tokens <= bindparam("new_tokens"))
    still = (audit.c.id == bindparam("request")) & audit.c.outcome.is_(None) & further
    connection.execute(update(audit).where(still).values({name: bindparam(f"new_{name}") for name in FIELDS}), rows)
