"""`corral usage`: what keys, tenants and models used, and what it cost."""

from __future__ import annotations

import csv
import io
import time
from typing import Any
from urllib.parse import urlencode

import click

from corral.cli import common
from corral.cli.common import Admin, rows
from corral.cli.keys import Span

_COUNTS = (
    *("requests", "refused", "failed", "estimated", "prompt_tokens", "tokens", "queue_seconds", "node_seconds"),
    "cost",
)


@click.group("usage")
def command() -> None:
    """What was used."""


@command.command("report")
@click.option("--by", default="key,model", show_default=True, help="Sum by: day, tenant, key, model.")
@click.option("--since", type=Span(unit=True), help="The days of the last 24h, 30d, …  [default: 30d]")
@click.option("--tenant", help="Of this tenant alone.")
@click.option("--key", help="Of this key alone: its id or its name.")
@click.option("--model", help="For this model alone.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@common.options
def report(as_json: bool, state: str | None, as_csv: bool, since: float | None, **given: Any) -> None:
    """Requests, tokens, time and cost, by whole days (UTC)."""
    query = {name: value for name, value in given.items() if value is not None}
    if since is not None:
        query["since"] = time.time() - since
    admin = Admin(common.folder(state))
    told = admin("GET", "/usage?" + urlencode(query))
    listed = rows(told, "usage")
    columns = [*told["by"], *(name for name in _COUNTS if name != "cost" or "currency" in told)]
    if as_csv:
        click.echo(_csv(listed, columns), nl=False)
        return
    shown = [_shown(row, told.get("currency", "")) for row in listed]
    if listed and "key" in columns and not as_json:  # for people, as in `audit list`
        names = common.key_names(admin)
        shown = [{**row, "key_name": names.get(row["key"])} for row in shown]
        columns.insert(columns.index("key") + 1, "key_name")
    common.emit(told, as_json, lambda: common.table(shown, columns, "nothing was used"))


def _csv(listed: list[dict[str, Any]], columns: list[str]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return out.getvalue()


def _shown(row: dict[str, Any], currency: str) -> dict[str, Any]:
    rounded = {name: f"{value:.1f}" for name, value in row.items() if name.endswith("seconds")}
    cost = {"cost": f"{row['cost']:.4f} {currency}"} if "cost" in row else {}
    return {**row, **rounded, **cost}
