"""`corral nodes`: the Ollama servers of the fleet."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click

from corral.cli import common
from corral.cli.common import Admin, rows, segment
from corral.stack.state import StackError


@click.group("nodes")
def command() -> None:
    """List, add, drain and remove nodes."""


@command.command("list")
@common.options
def list_nodes(as_json: bool, state: str | None) -> None:
    """List nodes and their states."""
    listed = rows(Admin(common.folder(state))("GET", "/nodes"), "nodes")
    columns = ("name", "state", "url", "slots", "version", "reason")
    shown = [{**node, "reason": "; ".join(filter(None, (_left(node), node.get("reason"))))} for node in listed]
    common.emit(listed, as_json, lambda: common.table(shown, columns, "no nodes"))


def _left(node: Mapping[str, Any]) -> str:
    """What still runs on a node that is being drained."""
    streams = node.get("streams")
    if streams is None:
        return ""
    running = "1 request still runs there" if streams == 1 else f"{streams} requests still run there"
    return running if streams else "drained"


@command.command("add")
@click.argument("url")
@click.option("--name", help="Unique in the fleet.  [default: the next node-N]")
@click.option("--slots", type=click.IntRange(1), help="Requests at once per model (its OLLAMA_NUM_PARALLEL).")
@click.option("--max-models", type=click.IntRange(1), help="Resident at once (its OLLAMA_MAX_LOADED_MODELS).")
@click.option("--preload/--no-preload", default=True, help="Use it once it has its models of the catalogue.")
@common.options
def add(url: str, as_json: bool, state: str | None, **given: Any) -> None:
    """Add an Ollama server; no request is dropped. With a catalogue it gets its models first."""
    body = {"url": url, **{key: item for key, item in given.items() if item is not None}}
    made = Admin(common.folder(state))("POST", "/nodes", body)
    common.emit(made, as_json, lambda: f"added {made['name']}{_waits(made) or _silent(made)}")


@command.command("remove")
@click.argument("name")
@common.options
def remove(name: str, as_json: bool, state: str | None) -> None:
    """Take a node out of the fleet."""
    done = Admin(common.folder(state))("DELETE", f"/nodes/{segment(name)}", timeout=90)
    common.emit(done or {"name": name}, as_json, lambda: f"removed {name}")


@command.command("drain")
@click.argument("name")
@click.option("--wait", is_flag=True, help="Return when nothing runs on it.")
@click.option("--timeout", type=click.IntRange(1), default=1800, show_default=True, help="Seconds for --wait.")
@common.options
def drain(name: str, wait: bool, timeout: int, as_json: bool, state: str | None) -> None:
    """Send no new work to a node; what runs ends in peace."""
    admin = Admin(common.folder(state))
    deadline = time.monotonic() + timeout
    path = f"/nodes/{segment(name)}/drain{'?wait=5' if wait else ''}"
    done = admin("POST", path, timeout=60)
    while wait and not done.get("drained"):
        if done.get("drained") is None:
            why = done.get("reason") or "control does not say why"
            raise StackError(f"{name} gets no new work, but whether requests still run there is not known: {why}")
        if time.monotonic() > deadline:
            raise StackError(f"{name}: {done.get('streams')} requests still run after {timeout} s")
        time.sleep(0.5)
        done = admin("GET", path, timeout=60)  # who resumes it meanwhile is not to be overruled
    common.emit(done, as_json, lambda: f"{name} is {'drained' if wait else 'draining'}")


@command.command("resume")
@click.argument("name")
@click.option("--preload/--no-preload", default=True, help="Use it once it has its models of the catalogue.")
@common.options
def resume(name: str, preload: bool, as_json: bool, state: str | None) -> None:
    """Use a drained node again. With a catalogue it gets what it lacks first."""
    path = f"/nodes/{segment(name)}/resume{'' if preload else '?preload=false'}"
    done = Admin(common.folder(state))("POST", path)
    common.emit(done, as_json, lambda: f"{name}{_waits(done) or ' is in use again'}")


def _silent(node: dict[str, Any]) -> str:
    """That a node does not answer, and what follows."""
    if not node.get("error"):
        return ""
    return f", which does not answer as Ollama does now ({node['error']}): it gets requests once it does"


def _waits(node: dict[str, Any]) -> str:
    """What has to happen before a node is used."""
    if node.get("state") != "draining" or not node.get("reason"):
        return ""
    return f": {node['reason']}; it is used after that (`corral models watch` shows how far it is)"
