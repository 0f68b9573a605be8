"""`corral models`: what the fleet can run."""

from __future__ import annotations

import click

from corral.cli import common
from corral.cli.common import Admin, rows


@click.group("models")
def command() -> None:
    """Show the models of the fleet."""


@command.command("list")
@common.options
def list_models(as_json: bool, state: str | None) -> None:
    """List models, the nodes that have them and those that keep them in memory."""
    listed = rows(Admin(common.folder(state))("GET", "/models"), "models")
    columns = ("name", "size", "nodes", "resident", "digest")
    common.emit(listed, as_json, lambda: common.table(listed, columns, "no models"))
