"""`corral tenants`: whom keys belong to."""

from __future__ import annotations

import click

from corral.cli import common
from corral.cli.common import Admin, rows, segment

_COLUMNS = ("name", "keys")


@click.group("tenants")
def command() -> None:
    """Create, list and remove tenants, which keys belong to."""


@command.command("create")
@click.argument("name")
@common.options
def create(name: str, as_json: bool, state: str | None) -> None:
    """Create a tenant; `corral keys create --tenant` makes one that is not there, too."""
    made = Admin(common.folder(state))("POST", "/tenants", {"name": name})
    common.emit(made, as_json, lambda: f"created {name}")


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
    common.emit(found, as_json, lambda: common.pairs(found))


@command.command("remove")
@click.argument("name")
@common.options
def remove(name: str, as_json: bool, state: str | None) -> None:
    """Remove a tenant that has no key which still works; its records stay."""
    gone = Admin(common.folder(state))("DELETE", f"/tenants/{segment(name)}")
    common.emit(gone, as_json, lambda: f"removed {name}")
