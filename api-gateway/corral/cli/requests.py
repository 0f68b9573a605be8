"""`corral requests`: what waits and what runs now."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import click

from corral.cli import common
from corral.cli.common import Admin, rows, segment

_COLUMNS = (
    *("id", "key", "tenant", "model", "state", "position", "estimate", "waited", "node", "tokens"),
    *("age", "gateway"),
)


@click.group("requests")
def command() -> None:
    """Show what waits and what runs now, over all gateways, and end it."""


@command.command("list")
@click.option("--model", help="For this model.")
@click.option("--key", help="Of this key alone: its id or its name.")
@click.option("--only", type=click.Choice(["queued", "loading", "running"]), help="In this state.")
@common.options
def list_requests(model: str | None, key: str | None, only: str | None, as_json: bool, state: str | None) -> None:
    """List requests that wait or run, the oldest first; times are seconds."""
    asked = {name: value for name, value in (("model", model), ("key", key), ("state", only)) if value}
    told = Admin(common.folder(state))("GET", f"/requests?{urlencode(asked)}")
    common.emit(told, as_json, lambda: _listed(told))


@command.command("show")
@click.argument("id")
@common.options
def show(id: str, as_json: bool, state: str | None) -> None:
    """Show a request that waits or runs, by its id or the X-Request-ID of its answer."""
    found = Admin(common.folder(state))("GET", f"/requests/{segment(id)}")
    common.emit(found, as_json, lambda: common.pairs(found))


@command.command("cancel")
@click.argument("id")
@common.options
def cancel(id: str, as_json: bool, state: str | None) -> None:
    """End a request that waits or runs: its caller gets an error."""
    done = Admin(common.folder(state))("POST", f"/requests/{segment(id)}/cancel")
    common.emit(done, as_json, lambda: f"cancelled {done['id']}")


def _listed(told: dict[str, Any]) -> str:
    lines = [common.table(rows(told, "requests"), _COLUMNS, "nothing waits or runs")]
    if told["left_out"]:
        lines.append(f"and {told['left_out']} more")
    if told["silent"]:
        lines.append(f"no answer in time from {', '.join(told['silent'])}")
    return "\n".join(lines)
