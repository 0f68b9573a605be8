"""Spool frames into the audit table, each exactly once: rows and watermark move in one transaction."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Boolean, Connection, Double, Integer, func, select, update

from corral.store.database import insert
from corral.store.spool import SpoolCorrupt, decode_frames
from corral.store.tables import audit, keys, spool_watermarks

log = logging.getLogger(__name__)

ADMITTED = ("id", "request_id", "ts", "gw", "key", "addr", "api", "route", "model")
SETTLED = (
    *("method", "status", "outcome", "node", "attempts", "req_bytes", "resp_bytes"),
    *("prompt_tokens", "tokens", "estimated", "queue_ms", "ttft_ms", "ms", "continued"),
)


class WrongOffset(Exception):
    """The frames do not begin where the last ones ended. ``offset`` is where that was."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"the segment is known up to byte {offset}")
        self.offset = offset


class Taken(NamedTuple):
    """What was taken: the segment's new watermark, and the rows by kind of record, for who counts them."""

    watermark: int
    admits: list[dict[str, Any]]
    settles: list[dict[str, Any]]


def ingest(connection: Connection, gateway: str, segment: str, offset: int, data: bytes) -> Taken:
    """Take the whole frames of `data`, which are at byte `offset` of the segment.

    What follows the last whole frame, or stands behind a corrupt one, is left to the next call.

    Raises:
        WrongOffset: `offset` is not the watermark; nothing was taken.
        SpoolCorrupt: the first frame is corrupt (offset of the segment); nothing was taken.
    """
    mark = spool_watermarks.c
    one = (mark.gateway == gateway) & (mark.segment == segment)
    fresh = {"gateway": gateway, "segment": segment, "position": 0, "updated": time.time()}
    connection.execute(insert(connection, spool_watermarks).values(fresh).on_conflict_do_nothing())
    position = connection.execute(select(mark.position).where(one).with_for_update()).scalar_one()
    if position != offset:
        raise WrongOffset(position)
    length, records = 0, []
    try:
        for end, record in decode_frames(data):
            length = end
            records.append(record)
    except SpoolCorrupt as error:
        if not length:
            raise SpoolCorrupt(offset + error.offset, str(error).partition(": ")[2]) from None
    taken = _store(connection, gateway, records)
    if length:
        connection.execute(update(spool_watermarks).where(one).values(position=offset + length, updated=time.time()))
    return Taken(offset + length, *taken)


def _store(
    connection: Connection, gateway: str, records: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    admits: dict[str, dict[str, Any]] = {}
    settles: dict[str, dict[str, Any]] = {}
    for record in records:
        row = _row(record, gateway)
        if row is None:
            log.error("a record of %s without an id or a known type is left out: %.200r", gateway, record)
        elif record["t"] == "admit":
            admits.setdefault(row["id"], row)
        else:
            settles.setdefault(row["id"], row)
    read = list(admits.values()), list(settles.values())
    _own(connection, [*admits.values(), *settles.values()])
    for known in settles:
        admits.pop(known, None)  # its settle record says all that it says
    if admits:
        statement = insert(connection, audit)
        connection.execute(statement.on_conflict_do_nothing(index_elements=["id"]), list(admits.values()))
    if settles:
        # The first settle stands: a replay of the same request by the edge counts once.
        statement = insert(connection, audit)
        completed = {name: func.coalesce(statement.excluded[name], audit.c[name]) for name in _COMPLETED}
        connection.execute(
            statement.on_conflict_do_update(index_elements=["id"], set_=completed, where=audit.c.outcome.is_(None)),
            list(settles.values()),
        )
    _note_use(connection, [*admits.values(), *settles.values()])
    return read


def _own(connection: Connection, rows: list[dict[str, Any]]) -> None:
    """Give each row the tenant of its key. A key never changes hands, so what is true now was true then."""
    named = {row["key"] for row in rows if row["key"]}
    found = select(keys.c.id, keys.c.tenant).where(keys.c.id.in_(named))
    tenants = {row.id: row.tenant for row in connection.execute(found)} if named else {}
    for row in rows:
        row["tenant"] = tenants.get(row["key"])


def _note_use(connection: Connection, rows: list[dict[str, Any]]) -> None:
    latest: dict[str, float] = {}
    for row in rows:
        if row["key"]:
            latest[row["key"]] = max(row["ts"], latest.get(row["key"], 0.0))
    used = keys.c.last_used
    for key, ts in sorted(latest.items()):
        newer = (keys.c.id == key) & (used.is_(None) | (used < ts))
        connection.execute(update(keys).where(newer).values(last_used=ts))


def _row(record: Mapping[str, Any], gateway: str) -> dict[str, Any] | None:
    """A row of a record, or None where it cannot be one. A field of the wrong type is null, not a lost row."""
    kind = record.get("t")
    if kind not in ("admit", "settle") or not isinstance(record.get("id"), str) or not record["id"]:
        return None
    row = {name: _CLEAN[name](record.get(name)) for name in (*ADMITTED, *SETTLED)}
    if kind == "settle":
        row["outcome"] = row["outcome"] or "unknown"
    row["gw"] = gateway
    row["ts"] = row["ts"] if row["ts"] is not None else time.time()
    return row


def _text(value: object) -> str | None:
    # PostgreSQL takes neither NUL nor lone surrogates.
    if not isinstance(value, str):
        return None
    return value.replace("\0", "").encode("utf-8", "replace").decode()


def _whole(bits: int) -> Callable[[object], int | None]:
    def clean(value: object) -> int | None:
        fits = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << (bits - 1)
        return value if fits else None  # type: ignore[return-value]

    return clean


def _real(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _cleaner(kind: object) -> Callable[[object], Any]:
    if isinstance(kind, Boolean):
        return _flag
    if isinstance(kind, Double):
        return _real
    if isinstance(kind, BigInteger):
        return _whole(64)
    return _whole(32) if isinstance(kind, Integer) else _text


_CLEAN = {name: _cleaner(audit.c[name].type) for name in (*ADMITTED, *SETTLED)}
_COMPLETED = (*ADMITTED[1:], "tenant", *SETTLED)
