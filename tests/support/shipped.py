"""Records as a gateway ships them, and what control makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select

from corral.store.database import Database, resolve
from corral.store.ingest import ingest
from corral.store.spool import encode_frame
from corral.store.tables import audit, keys

NOON = 1_800_000_000.0


@contextmanager
def record(url: str, folder: Path) -> Iterator[Database]:
    """A database with a key ``k`` of tenant ``team``."""
    made = Database(resolve(url, folder))
    made.migrate()
    key = {"id": "k", "name": "n", "tenant": "team", "role": "inference", "models": ["*"], "class": "batch"}
    made.write_now(lambda connection: connection.execute(insert(keys).values(**key, created=1.0)))
    yield made
    made.close()


def admit(number: int, **fields: Any) -> dict[str, Any]:
    record = {"t": "admit", "id": f"edge-{number}", "request_id": "shown", "ts": NOON, "gw": "g", "key": "k"}
    return {**record, "addr": "::1", "api": "native", "route": "/api/chat", "model": "m:latest", **fields}


def settle(number: int, **fields: Any) -> dict[str, Any]:
    done = {"method": "POST", "status": 200, "outcome": "ok", "node": "node-1", "attempts": 1, "req_bytes": 9}
    measured = {"resp_bytes": 8, "prompt_tokens": 7, "tokens": 6, "estimated": False}
    times = {"queue_ms": 500.0, "ttft_ms": 700.0, "ms": 2500.0}
    return {**admit(number), "t": "settle", **done, **measured, **times, **fields}


def begin(gateway: str = "gateway-1", **fields: Any) -> dict[str, Any]:
    return {"t": "begin", "gw": gateway, "ts": NOON, **fields}


class Spool:
    """A gateway's segment as control gets it."""

    def __init__(self, database: Database, gateway: str = "gateway-1") -> None:
        self._database, self._gateway, self._offset = database, gateway, 0

    def ship(self, *records: dict[str, Any]) -> None:
        data = b"".join(encode_frame(record) for record in records)
        taken = self._database.write_now(ingest, self._gateway, "0000000000000001.seg", self._offset, data)
        self._offset = taken.watermark


def rows(database: Database) -> list[dict[str, Any]]:
    statement = select(audit).order_by(audit.c.seq)
    return database.read_now(lambda connection: [dict(row) for row in connection.execute(statement).mappings()])
