"""Rows of the audit trail for what administrators do, by the admin API or by a command on control's machine."""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
import uuid
from typing import Any

from sqlalchemy import Connection, insert

from corral.store.seal import seal
from corral.store.tables import audit

COMMAND = "RUN"
"""What stands where a call of the admin API has its method."""


def by() -> str:
    """Who runs a command: user and machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def ran(connection: Connection, command: str, told: dict[str, Any]) -> None:
    """Enter what a command did past the admin API, in the transaction that does it."""
    enter(connection, COMMAND, command, None, {**told, "by": by()})


def enter(
    connection: Connection,
    method: str,
    route: str,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    status: int = 200,
    **who: str | None,
) -> None:
    """Enter an action, in the transaction that does it; sealed in the stream `control`.

    `status` 400 and above: it was refused, from 500 on it failed. `who` has ``key``, ``tenant``, ``addr`` and
    ``request_id``, as far as they are known.
    """
    action = str(uuid.uuid4())
    row = {
        "id": action,
        "request_id": who.get("request_id") or action,
        "ts": time.time(),
        "key": who.get("key") or None,
        "tenant": who.get("tenant") or None,
        "addr": who.get("addr"),
        "api": "admin",
        "route": route,
        "method": method,
        "status": status,
        "outcome": "ok" if status < 400 else "refused" if status < 500 else "failed",
        # As the database will give them back.
        "before": None if before is None else json.loads(json.dumps(before)),
        "after": None if after is None else json.loads(json.dumps(after)),
    }
    seal(connection, "control", [row])
    connection.execute(insert(audit).values(row))
