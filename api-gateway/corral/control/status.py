"""What the fleet holds, and how everything is."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import hiredis
from fastapi import APIRouter

from corral.config.local import listeners, loopback_port
from corral.control.context import Control, Here
from corral.control.requests import waits
from corral.store.valkey import ValkeyDown

router = APIRouter(tags=["fleet"])


@router.get("/admin/status")
async def status(control: Here) -> dict[str, Any]:
    """Control, gateways, nodes and stores. A part that is away makes this no error."""
    nodes = list(control.fleet.members.values())
    valkey_url = control.settings.store.valkey
    urls = [(node.url, 443 if node.url.startswith("https:") else 80) for node in nodes]
    database, valkey, alerts, (valkey_pid, *pids) = await asyncio.gather(
        control.database.answers(),
        _valkey(control),
        control.alerts.now(),
        asyncio.to_thread(_pids, [(valkey_url, 6379), *urls]),
    )
    return {
        "control": {
            "pid": os.getpid(),
            "leader": not control.leading.missing,
            "url": f"http://{control.settings.control.listen}",
        },
        "snapshot": {"version": control.hub.version},
        "gateways": [
            {
                "name": gateway.name,
                "last_seen": gateway.seen,
                "state": "ready" if gateway.present else "down",
                "current": gateway.version == control.hub.version,
                "store": gateway.store,
                "aside": {"count": gateway.aside, "names": gateway.aside_names},
            }
            for gateway in control.hub.known()
        ],
        "queues": waits(control.hub.present()),
        "nodes": [
            {
                "name": node.name,
                "url": node.url,
                "state": node.condition,
                "pid": pid,
                "reason": node.reason,
                "models": sorted(entry["name"] for entry in node.usable),
            }
            for node, pid in zip(nodes, pids, strict=True)
        ],
        "store": {
            "valkey": {"state": "ready" if valkey else "down", "pid": valkey_pid},
            "database": {"state": "ready" if database else "down"},
        },
        "audit": {"checkpoint": control.ledger.number, "stranger": control.ledger.stranger},
        "haproxy": {"managed": control.haproxy.configured},
        "alerts": alerts,
    }


def _pids(urls: Sequence[tuple[str, int]]) -> list[int | None]:
    """For each (URL, default port) the pid of who listens there, None where that is not on this machine."""
    ports = [loopback_port(url, default) for url, default in urls]
    found = listeners({port for port in ports if port is not None})
    return [None if port is None else found.get(port) for port in ports]


async def _valkey(control: Control) -> bool:
    try:
        async with asyncio.timeout(1.0):
            await control.valkey.request(b"PING")
    except (ValkeyDown, TimeoutError, hiredis.HiredisError):
        return False
    return True
