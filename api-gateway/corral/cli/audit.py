"""`corral audit`: who asked what, when, and how it ended."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlencode

import click

from corral.cli import common
from corral.cli.common import Admin, rows
from corral.cli.keys import Span

_COLUMNS = (
    *("time", "request_id", "id", "key", "key_name", "addr", "method", "route", "model", "node", "status", "outcome"),
    *("prompt_tokens", "tokens", "ms"),
)


@click.group("audit")
def command() -> None:
    """Read the audit trail."""


@command.command("list")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="Records at most.")
@click.option("--after", type=click.IntRange(0), help="Records behind this number (seq).")
@click.option("--key", help="Of this key's id alone.")
@click.option("--model", help="For this model alone.")
@click.option("--request", help="Of this request alone: the X-Request-ID that its caller got.")
@click.option("--since", type=Span(), help="Of the last 10m, 24h, …")
@common.options
def list_records(as_json: bool, state: str | None, since: float | None, **given: Any) -> None:
    """List audit records, oldest first."""
    query = {name: value for name, value in given.items() if value is not None}
    if since is not None:
        query["since"] = time.time() - since
    admin = Admin(common.folder(state))
    listed = rows(admin("GET", "/audit?" + urlencode(query)), "audit")
    # For people alone: that keys were read is in the trail, too.
    names = {} if as_json or not listed else {key["id"]: key["name"] for key in rows(admin("GET", "/keys"), "keys")}
    shown = [{**_shown(item), "key_name": names.get(item.get("key"))} for item in listed]
    common.emit(listed, as_json, lambda: common.table(shown, _COLUMNS, "no records"))


def _shown(record: dict[str, Any]) -> dict[str, Any]:
    ts = record.get("ts")
    shown = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ts)) if isinstance(ts, int | float) else ts
    return {**record, "time": shown}
