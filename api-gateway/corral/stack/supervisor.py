"""Talking with the supervisor over its unix socket."""

from __future__ import annotations

import xmlrpc.client
from http.client import HTTPException
from typing import Any

from corral.stack.state import StateFolder


def processes(state: StateFolder) -> dict[str, dict[str, Any]]:
    """Name → what supervisord says of it (``pid``, ``statename``, ``start``, ``spawnerr``); empty without one."""
    from supervisor.xmlrpc import SupervisorTransport

    transport = SupervisorTransport(None, None, f"unix://{state.socket('supervisor.sock')}")
    try:
        with xmlrpc.client.ServerProxy("http://localhost", transport) as server:
            listed: Any = server.supervisor.getAllProcessInfo()
    except (OSError, HTTPException, xmlrpc.client.Error):
        return {}
    return {str(item["name"]): item for item in listed}
