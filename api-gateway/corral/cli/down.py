"""`corral down`: stop what `corral up` started."""

from __future__ import annotations

import click

from corral.cli import common


@click.command("down")
@common.options
def command(as_json: bool, state: str | None) -> None:
    """Stop the stack; its state stays."""
    from corral.stack.up import down

    stopped = down(common.folder(state))
    common.emit({"stopped": stopped}, as_json, lambda: "stopped" if stopped else "nothing was running")
