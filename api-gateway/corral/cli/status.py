"""`corral status`: what runs and how it is."""

from __future__ import annotations

import os
from typing import Any

import click

from corral.cli import common


@click.command("status")
@common.options
def command(as_json: bool, state: str | None) -> None:
    """Show what runs: address, processes, nodes and their models, store, who waits, alerts."""
    from corral.stack import status

    admin = common.Admin(common.folder(state))
    local = common.folder(state) if not os.environ.get("CORRAL_URL") else None
    known = status.status(admin.url, lambda: admin("GET", "/status"), local)
    if local is not None and local.stopping:
        click.echo("corral: it is being stopped; any answers that have begun may end", err=True)
    common.emit(known, as_json, lambda: _text(known))


def _gateway(gateway: dict[str, Any]) -> str:
    serves = gateway["state"] in ("up", "ready")
    return f"{gateway['state']}, without valkey" if serves and gateway["store"] is False else str(gateway["state"])


def _text(known: dict[str, Any]) -> str:
    valkey, database = known["store"]["valkey"], known["store"]["database"]
    parts = [
        {"part": "edge", "state": known["edge"]["state"], "pid": known["edge"]["pid"], "url": known["url"]},
        *({**gateway, "part": gateway["name"], "state": _gateway(gateway)} for gateway in known["gateways"]),
        {"part": "control", **known["control"]},
        {"part": "valkey", **valkey},
        {"part": "database", **database},
        *({"part": name, **part} for name, part in known["monitoring"].items()),
    ]
    columns = ("name", "state", "pid", "url", "models", "reason")
    tables = [
        common.table(parts, ("part", "state", "pid", "url"), ""),
        common.table(known["nodes"], columns, "no nodes"),
    ]
    if known["queues"]:
        # "estimate": what one more would wait.
        waiting = common.table(known["queues"], ("model", "waiting", "oldest", "estimate"), "")
        tables.append(f"Requests that wait for a slot (seconds)\n{waiting}")
    if known["alerts"]:
        firing = common.table(known["alerts"], ("severity", "name", "since", "summary", "runbook"), "")
        tables.append(f"Alerts firing\n{firing}")
    return "\n\n".join(tables)
