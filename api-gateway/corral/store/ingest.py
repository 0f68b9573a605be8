"""Spool frames into the audit table, each exactly once: rows, chain, usage and watermark move in one transaction."""

from __future__ import annotations

import logging
import time
from base64 import b64decode
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, NamedTuple

from sqlalchemy import Connection, RowMapping, select, update

from corral.store import progress, usage
from corral.store.clean import CLEAN
from corral.store.database import insert
from corral.store.seal import seal
from corral.store.spool import SpoolCorrupt, decode_frames
from corral.store.tables import audit, audit_content, keys, spool_watermarks

log = logging.getLogger(__name__)

ADMITTED = ("id", "request_id", "ts", "gw", "key", "addr", "api", "route", "model", "prompt_hash")
SETTLED = (
    *("method", "status", "outcome", "node", "attempts", "req_bytes", "resp_bytes"),
    *("prompt_tokens", "tokens", "estimated", "queue_ms", "ttft_ms", "ms", "continued", "answer_hash", "model_digest"),
)


class WrongOffset(Exception):
    """The frames do not begin where the last ones ended. ``offset`` is where that was."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"the segment is known up to byte {offset}")
        self.offset = offset


class Taken(NamedTuple):
    """What was taken: the segment's new watermark, the rows admitted, and those settled now, for who counts them."""

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
    moved: dict[str, dict[str, Any]] = {}
    contents: dict[str, dict[str, Any]] = {}
    kept: dict[str, dict[str, Any]] = {}
    begun: float | None = None
    gone = False
    for record in records:
        kind = record.get("t")
        if kind == "begin":
            begun, gone = CLEAN["ts"](record.get("ts")) or 0.0, record.get("gone") is True
            continue
        if kind == "content":  # of a gateway before 0012: no record names it
            content = _content(record.get("of"), record.get("ts"), record.get("data"))
            if content is not None:
                contents.setdefault(content["id"], content)
            continue
        if kind == "progress":
            far = progress.read(record)
            moved.update({known: row for known, row in far.items() if progress.later(row, moved.get(known))})
            continue
        row = _row(record, gateway)
        if row is None:
            log.error("a record of %s without an id or a known type is left out: %.200r", gateway, record)
        elif kind == "admit":
            admits.setdefault(row["id"], row)
        elif row["id"] not in settles:
            settles[row["id"]] = row
            content = _content(row["id"], row["ts"], record.get("content"))
            if content is not None:
                row["content_hash"] = sha256(content["data"]).hexdigest()
                kept[row["id"]] = content
    # Once each, and before this segment's own rows: a call may bring tens of thousands of records.
    if begun is not None:
        progress.begun(connection, gateway, begun, gone)
    if contents:
        connection.execute(insert(connection, audit_content).on_conflict_do_nothing(), list(contents.values()))
    _own(connection, [*admits.values(), *settles.values()])
    read = list(admits.values())
    for known, row in settles.items():
        admitted = admits.pop(known, None)  # its settle record says all that it says, but for the prompt
        if admitted is not None:
            row["prompt_hash"] = admitted["prompt_hash"]
    if admits:
        # The edge replays a request to another gateway, under the same id.
        connection.execute(insert(connection, audit).on_conflict_do_nothing(), list(admits.values()))
        progress.held(connection, gateway, list(admits))
    progress.note(connection, [row for known, row in moved.items() if known not in settles])
    done = complete(connection, gateway, list(settles.values()))
    # The text that the record names, which is that of the settle that stands.
    _keep(connection, [kept[row["id"]] for row in done if row["id"] in kept])
    used: dict[str, float] = {}
    for row in (*admits.values(), *settles.values()):
        if row["key"]:
            used[row["key"]] = max(row["ts"], used.get(row["key"], 0.0))
    note_use(connection, used)
    return read, done


def _keep(connection: Connection, contents: list[dict[str, Any]]) -> None:
    if contents:
        statement = insert(connection, audit_content)
        theirs = {"ts": statement.excluded.ts, "data": statement.excluded.data}
        connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_=theirs), contents)


def _content(of: object, at: object, data: object) -> dict[str, Any] | None:
    """A row of a prompt and an answer, from now at the latest, or it would never end; None where it cannot be one."""
    request, ts = CLEAN["id"](of), CLEAN["ts"](at)
    try:
        sealed = b64decode(data, validate=True) if isinstance(data, str) else b""
    except ValueError:
        sealed = b""
    if not request or ts is None or not sealed:
        return None
    return {"id": request, "ts": min(ts, time.time()), "data": sealed}


def _own(connection: Connection, rows: list[dict[str, Any]]) -> None:
    """Give each row the tenant of its key. A key never changes hands, so what is true now was true then."""
    named = {row["key"] for row in rows if row["key"]}
    found = select(keys.c.id, keys.c.tenant).where(keys.c.id.in_(named))
    tenants = {row.id: row.tenant for row in connection.execute(found)} if named else {}
    for row in rows:
        row["tenant"] = tenants.get(row["key"])


def complete(connection: Connection, gateway: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Settle requests: their rows are completed, sealed in the gateway's chain, and counted.

    The first settle stands: a replay of the same request by the edge counts once. Those that were settled now.
    """
    known = _known(connection, [row["id"] for row in rows])
    fresh = []
    for row in rows:
        before = known.get(row["id"])
        if before is None:
            fresh.append(row)
        elif before["outcome"] is None:
            fresh.append(row | {name: before[name] for name in _COMPLETED if row[name] is None})
    seal(connection, gateway, fresh)
    if fresh:
        statement = insert(connection, audit)
        completed = {name: statement.excluded[name] for name in (*_COMPLETED, "gw", "pos", "leaf")}
        connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_=completed), fresh)
        usage.add(connection, fresh)
    return fresh


def _known(connection: Connection, ids: list[str]) -> dict[str, RowMapping]:
    found = {}
    columns = [audit.c[name] for name in ("id", *_COMPLETED)]
    for some in progress.pieces(ids):
        rows = connection.execute(select(*columns).where(audit.c.id.in_(some))).mappings()
        found.update({row["id"]: row for row in rows})
    return found


def note_use(connection: Connection, latest: Mapping[str, float]) -> None:
    """Enter when keys were used last (epoch seconds, by id)."""
    used = keys.c.last_used
    for key, ts in sorted(latest.items()):
        newer = (keys.c.id == key) & (used.is_(None) | (used < ts))
        connection.execute(update(keys).where(newer).values(last_used=ts))


def _row(record: Mapping[str, Any], gateway: str) -> dict[str, Any] | None:
    """A row of a record, or None where it cannot be one. A field of the wrong type is null, not a lost row."""
    kind = record.get("t")
    if kind not in ("admit", "settle") or not isinstance(record.get("id"), str) or not record["id"]:
        return None
    row = {name: CLEAN[name](record.get(name)) for name in (*ADMITTED, *SETTLED)}
    if kind == "settle":
        row["outcome"] = row["outcome"] or "unknown"
        row["content_hash"] = None
    row["gw"] = gateway
    row["ts"] = row["ts"] if row["ts"] is not None else time.time()
    return row


_COMPLETED = tuple(name for name in (*ADMITTED[1:], "tenant", *SETTLED, "content_hash") if name != "gw")
