"""`corral tenants`: whom keys belong to."""

from __future__ import annotations

from typing import Any

import click

from corral.cli import common
from corral.cli.common import Admin, rows, segment
from corral.cli.keys import Named

_COLUMNS = ("name", "keys", "rpm", "tpm", "concurrency", "daily_tokens", "monthly_tokens")
_limits = common.limits(none=True, of=", of all its keys")


@click.group("tenants")
def command() -> None:
    """Create, list and remove tenants, which keys belong to, and limit what their keys use together."""


@command.command("create")
@click.argument("name", type=Named())
@_limits
@common.options
def create(name: str, as_json: bool, state: str | None, **limits: int | None) -> None:
    """Create a tenant; `corral keys create --tenant NAME --new-tenant` makes one too."""
    made = Admin(common.folder(state))("POST", "/tenants", {"name": name, **common.given(limits)})
    common.emit(made, as_json, lambda: f"created {name}")


@command.command("limit")
@click.argument("name")
@_limits
@common.options
def limit(name: str, as_json: bool, state: str | None, **limits: int | None) -> None:
    """Change the limits that a tenant's keys share; `none` takes one away, what is not named stays."""
    if not (changes := common.given(limits)):
        raise click.UsageError("name at least one limit, such as --rpm 600 or --tpm none")
    made = Admin(common.folder(state))("PATCH", f"/tenants/{segment(name)}", changes)
    common.emit(made, as_json, lambda: common.pairs(_shown(made)))


@command.command("list")
@common.options
def list_tenants(as_json: bool, state: str | None) -> None:
    """List tenants and how many of their keys work."""
    listed = rows(Admin(common.folder(state))("GET", "/tenants"), "tenants")
    common.emit(listed, as_json, lambda: common.table(listed, _COLUMNS, "no tenants"))


@command.command("show")
@click.argument("name")
@common.options
def show(name: str, as_json: bool, state: str | None) -> None:
    """Show a tenant."""
    found = Admin(common.folder(state))("GET", f"/tenants/{segment(name)}")
    common.emit(found, as_json, lambda: common.pairs(_shown(found)))


@command.command("remove")
@click.argument("name")
@common.options
def remove(name: str, as_json: bool, state: str | None) -> None:
    """Remove a tenant that has no key which still works; its records stay."""
    gone = Admin(common.folder(state))("DELETE", f"/tenants/{segment(name)}")
    common.emit(gone, as_json, lambda: f"removed {name}")


def _shown(tenant: dict[str, Any]) -> dict[str, Any]:
    return {**tenant, "created": common.moment(tenant.get("created"))}
