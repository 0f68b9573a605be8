"""`corral up`: the whole stack on this machine."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click

from corral.cli import common
from corral.config.settings import Settings
from corral.stack.signals import Stopped, say, stopped_by_signals


@click.command("up")
@click.option("--nodes", type=click.IntRange(1, 256), help="How many nodes to start.  [default: 2, or one per GPU]")
@click.option("--attach", multiple=True, metavar="URL", help="Use an Ollama that runs already (repeatable).")
@click.option(
    "--node-backend",
    type=click.Choice(["ollama", "llama", "simulated"]),
    help="What the nodes run. ollama: PATH's, or what scripts/install-ollama made.  "
    "[default: ollama if it is on PATH, else llama]",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the address that clients use.  [default: 8080]")
@click.option("--config", metavar="FILE", help="Configuration.  [default: ./corral.yaml if it is there]")
@click.option("--new-pepper", is_flag=True, help="If the pepper is lost: make a new one and revoke all keys.")
@click.option("--monitoring", is_flag=True, help="Start Prometheus and Alertmanager as well (both from PATH).")
@click.option("--detach", is_flag=True, help="Return when it is ready; `corral down` stops it.")
@common.options
def command(
    nodes: int | None,
    attach: tuple[str, ...],
    node_backend: str | None,
    port: int | None,
    config: str | None,
    new_pepper: bool,
    monitoring: bool,
    detach: bool,
    as_json: bool,
    state: str | None,
) -> None:
    """Start the whole stack on this machine; ready when it says so."""
    try:
        with stopped_by_signals():
            from corral.config.values import base_url
            from corral.stack import up as stack

            if attach and (nodes or node_backend):
                raise click.UsageError(
                    "--attach uses what runs already: it goes with neither --nodes nor --node-backend"
                )
            try:
                urls = tuple(base_url(url) for url in attach)
            except ValueError as error:
                raise click.BadParameter(str(error), param_hint="--attach") from None
            where = common.folder(state)
            chosen = stack.Options(config, port, nodes, urls, node_backend, detach, monitoring)
            _finish_restore(where.root)
            click.echo("corral: starting", err=True)
            bootstrap = partial(_bootstrap, new_pepper=new_pepper)
            announce = partial(_announce, as_json=as_json, detach=detach, option=where.option(os.environ))
            status = stack.up(where, chosen, os.environ, _progress, bootstrap, announce)
    except (Stopped, KeyboardInterrupt):
        say("corral: stopped before it was ready")
        raise SystemExit(1) from None
    if not detach:
        say("corral: stopped")
    raise SystemExit(status)


def _finish_restore(state: Path) -> None:
    if not state.is_dir():
        return
    from corral.stack.state import StackError
    from corral.store.replace import ReplaceError, finish

    try:
        if ended := finish(state):
            click.echo(f"corral: a restore that was interrupted is {ended}", err=True)
    except ReplaceError as error:
        raise StackError(str(error)) from None


def _bootstrap(state: Path, settings: Settings, new_pepper: bool) -> None:
    from corral.control.bootstrap import BootstrapError, bootstrap
    from corral.stack.state import StackError
    from corral.store.database import DatabaseError
    from corral.store.keys import PepperError

    try:
        bootstrap(state, settings, new_pepper, "corral up")
    except (BootstrapError, DatabaseError, PepperError) as error:
        raise StackError(str(error)) from None


def _progress(line: str) -> None:
    click.echo(f"  ready: {line}", err=True)


def _announce(made: dict[str, Any], as_json: bool, detach: bool, option: str) -> None:
    try:
        click.echo(json.dumps(made) if as_json else _welcome(made, detach, option))
    except (Stopped, KeyboardInterrupt):
        # Nobody takes it: Python would wait for that again as it ends.
        with suppress(OSError, ValueError):
            common.unread()
        raise


def _welcome(made: dict[str, Any], detach: bool, option: str) -> str:
    key = made["key"] or f"shown on the first start; another: corral keys create NAME{option}"
    stop = f"`corral down{option}` stops it." if detach else "Ctrl-C stops it."
    watched = "".join(f"\n{name:<13} {known['url']}" for name, known in made.get("monitoring", {}).items())
    note = f"\n\nBut   {made['note']}" if made.get("note") else ""
    return f"\nCorral serves at {made['url']}\nKey   {key}{watched}\n\nTry   {made['curl']}{note}\n\n{stop}"
