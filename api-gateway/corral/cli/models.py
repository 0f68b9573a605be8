"""`corral models`: what the fleet can run, what it should, and the way from one to the other."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from corral.cli import common, progress
from corral.cli.common import Admin, rows
from corral.fleet.node import canonical_name
from corral.stack import reload
from corral.stack.state import StackError, StateFolder

_PATIENCE = 60.0

_nodes = click.option(
    "--node", "nodes", multiple=True, metavar="NAME", help="On this node (repeatable).  [default: all]"
)


@click.group("models")
def command() -> None:
    """Show the models of the fleet, and bring the nodes to the catalogue of corral.yaml."""


@command.command("list")
@common.options
def list_models(as_json: bool, state: str | None) -> None:
    """List models, the nodes that have them and those that keep them in memory."""
    listed = rows(Admin(common.folder(state))("GET", "/models"), "models")
    columns = ("name", "size", "nodes", "resident", "catalogue", "pinned", "disabled", "digest")
    common.emit(listed, as_json, lambda: common.table([_shown(model) for model in listed], columns, "no models"))


def _shown(model: dict[str, Any]) -> dict[str, Any]:
    size = model.get("size")
    digest = str(model.get("digest") or "").removeprefix("sha256:")[:12]
    match = model.get("match")
    if match == "differs":
        match = f"differs on {','.join(model.get('differs') or [])}"
    disabled = f"yes: {reason}" if (reason := model.get("disabled_reason")) else model.get("disabled")
    shown = {"size": progress.size(size) if size else None, "digest": digest, "catalogue": match, "disabled": disabled}
    return {**model, **shown}


@command.command("why")
@click.argument("name")
@common.options
def why(name: str, as_json: bool, state: str | None) -> None:
    """Show where a model stands, and the leader's last decisions about it with their reasons, newest first."""
    told = Admin(common.folder(state))("GET", f"/models/why?model={common.segment(name)}")
    common.emit(told, as_json, lambda: _why(told))


def _why(told: dict[str, Any]) -> str:
    lines = []
    if told.get("disabled"):
        reason = told.get("disabled_reason")
        lines.append(f"disabled: {reason or 'nobody said why'} (`corral models enable` has callers use it again)")
    if not told["leader"]:
        lines.append("this control does not lead: nodes load models by themselves, or another says what stands where")
        return "\n".join(lines)
    if not told.get("held", True):
        lines.append("no node holds it: `corral models apply` or `pull` brings it")
    lines += [f"{place['state']} on {place['node']} for {place['seconds']:.0f} s" for place in told["places"]]
    if told["waits"] is not None:
        lines.append(f"its oldest request waits for {told['waits']:.0f} s")
    lines += [f"  {one['ago']:.0f} s ago: {one['what']}" for one in told["decisions"]]
    return "\n".join(lines or ["nowhere in memory, and nobody asked for it"])


@command.command("plan")
@common.options
def plan(as_json: bool, state: str | None) -> None:
    """Show the steps that would put the catalogue in force; changes nothing."""
    folder = common.folder(state)
    made = Admin(folder)("GET", "/models/plan", timeout=_PATIENCE)
    common.emit(made, as_json, lambda: _plan(made) if made["catalogue"] else _no_catalogue(folder))


def _no_catalogue(folder: StateFolder) -> str:
    """That there is none, and how this stack comes by one."""
    none = "no catalogue: the nodes serve whatever they hold. To have one, name models in corral.yaml (models:), then"
    if os.environ.get("CORRAL_URL"):
        return f"{none} `corral config reload` where `corral up` runs with that file, or a restart of control"
    option = folder.option(os.environ)
    if file := reload.file_of(folder):
        return f"{none} `corral config reload{option}` ({file})"
    return (
        f"{none} `corral down{option}` and `corral up --config corral.yaml{option}`: this stack was started without one"
    )


def _plan(made: dict[str, Any]) -> str:
    lines = [f"  {progress.what(step)}: {step['reason']}" for step in made["steps"]]
    lines += [f"  note: {note}" for note in made["notes"]]
    lines += [f"  problem: {problem}" for problem in made["problems"]]
    count = len(made["steps"])
    head = f"{count} step{'s' if count != 1 else ''}" if count else "nothing to do"
    return "\n".join([head, *lines])


@command.command("apply")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common.options
def apply(yes: bool, as_json: bool, state: str | None) -> None:
    """Put the catalogue in force: pull what is missing, verify digests, load copies. Shows its progress."""
    folder = common.folder(state)
    admin = Admin(folder)
    made = admin("GET", "/models/plan", timeout=_PATIENCE)
    if not made["catalogue"]:
        raise StackError(_no_catalogue(folder))
    if not yes and made["steps"]:
        if not sys.stdin.isatty():
            raise click.UsageError("nobody is there to ask: give --yes (`corral models plan` shows the steps)")
        click.echo(_plan(made), err=True)
        click.confirm("Carry this out?", abort=True, err=True)
    _operate(admin, "apply", {"plan": made["id"]}, as_json)


@command.command("pull")
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@_nodes
@click.option("--accept", is_flag=True, help="Record the digest that comes as the right one (none in corral.yaml).")
@common.options
def pull(names: tuple[str, ...], nodes: tuple[str, ...], accept: bool, as_json: bool, state: str | None) -> None:
    """Pull models onto the nodes; those of the catalogue must come with its digest."""
    body = {"models": names, "nodes": nodes or None, "accept": accept}
    _operate(Admin(common.folder(state)), "pull", body, as_json)


@command.command("load")
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@_nodes
@common.options
def load(names: tuple[str, ...], nodes: tuple[str, ...], as_json: bool, state: str | None) -> None:
    """Load models, to stay in memory until they are unloaded."""
    _operate(Admin(common.folder(state)), "load", {"models": names, "nodes": nodes or None}, as_json)


@command.command("unload")
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@_nodes
@click.option("--force", is_flag=True, help="Pinned models too.")
@common.options
def unload(names: tuple[str, ...], nodes: tuple[str, ...], force: bool, as_json: bool, state: str | None) -> None:
    """Take models out of memory, once their requests have ended; says what loads them again."""
    body = {"models": names, "nodes": nodes or None, "force": force}
    _operate(Admin(common.folder(state)), "unload", body, as_json)


@command.command("remove")
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@_nodes
@click.option("--force", is_flag=True, help="Models of the catalogue too.")
@click.option("--yes", is_flag=True, help="Do not ask before a model's last copy goes.")
@common.options
def remove(
    names: tuple[str, ...], nodes: tuple[str, ...], force: bool, yes: bool, as_json: bool, state: str | None
) -> None:
    """Delete models from the nodes, with the previous versions that are kept there."""
    admin = Admin(common.folder(state))
    last = [] if yes else _last_copies(admin, names, nodes)
    if last and not sys.stdin.isatty():
        raise click.UsageError(f"no node would hold {', '.join(last)} any more: give --yes, or --node NAME")
    if last:
        click.confirm(f"No node will hold {', '.join(last)} any more. Delete?", abort=True, err=True)
    _operate(admin, "remove", {"models": names, "nodes": nodes or None, "force": force}, as_json)


def _last_copies(admin: Admin, names: tuple[str, ...], nodes: tuple[str, ...]) -> list[str]:
    """Of the models, those that would be on no node without these (none given: without all)."""
    wanted = {canonical_name(name) for name in names}
    listed = [model for model in rows(admin("GET", "/models"), "models") if model["name"] in wanted]
    return [
        str(model["name"]) for model in listed if model["nodes"] and not (nodes and set(model["nodes"]) - set(nodes))
    ]


@command.command("preload")
@click.argument("names", nargs=-1, metavar="[NAME…]")
@_nodes
@common.options
def preload(names: tuple[str, ...], nodes: tuple[str, ...], as_json: bool, state: str | None) -> None:
    """Pull models and load them, on every node.  [default: the catalogue]"""
    _operate(Admin(common.folder(state)), "preload", {"models": names, "nodes": nodes or None}, as_json)


@command.command("disable")
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@click.option("--reason", help="Why, for other operators.")
@common.options
def disable(names: tuple[str, ...], reason: str | None, as_json: bool, state: str | None) -> None:
    """Refuse all new requests for models, on every gateway within a second; answers that have begun go on."""
    done = Admin(common.folder(state))("POST", "/models/disable", {"models": names, "reason": reason})
    text = [f"disabled {', '.join(names)}{common.late(done)}"]
    text += [f"note: no node holds {name}, and the catalogue does not name it" for name in done["unknown"]]
    common.emit(done, as_json, lambda: "\n".join(text))


@command.command("enable")
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@common.options
def enable(names: tuple[str, ...], as_json: bool, state: str | None) -> None:
    """Take requests for disabled models again."""
    done = Admin(common.folder(state))("POST", "/models/enable", {"models": names})
    text = [f"enabled {', '.join(names)}{common.late(done)}"]
    text += [f"note: {name} was not disabled" for name in done["unknown"]]
    common.emit(done, as_json, lambda: "\n".join(text))


@command.command("operations")
@common.options
def operations(as_json: bool, state: str | None) -> None:
    """List what runs, and what ended lately."""
    listed = rows(Admin(common.folder(state))("GET", "/operations"), "operations")
    columns = ("id", "kind", "state", "by", "steps", "errors")
    shown = [{**one, "steps": len(one["steps"]), "errors": len(one["errors"])} for one in listed]
    common.emit(listed, as_json, lambda: common.table(shown, columns, "no operations"))


@command.command("watch")
@click.argument("id", required=False)
@common.options
def watch(id: str | None, as_json: bool, state: str | None) -> None:
    """Show the progress of an operation until it ends.  [default: of all that run]"""
    admin = Admin(common.folder(state))
    running = [one["id"] for one in rows(admin("GET", "/operations"), "operations") if one["state"] == "running"]
    wanted = [id] if id else running
    if not wanted and not as_json:
        click.echo("nothing runs")
    ended = [progress.follow(admin, one) for one in wanted]
    if as_json:
        common.emit(ended[0] if id else ended, True, str)
    raise SystemExit(progress.conclude(ended, as_json))


@command.command("cancel")
@click.argument("id")
@common.options
def cancel(id: str, as_json: bool, state: str | None) -> None:
    """Stop an operation; what is done stays done."""
    done = Admin(common.folder(state))("POST", f"/operations/{common.segment(id)}/cancel", timeout=_PATIENCE)
    common.emit(done, as_json, lambda: f"{id} is {done['state']}")


def _operate(admin: Admin, kind: str, body: dict[str, Any], as_json: bool) -> None:
    """Start an operation, show how it goes, and end with its outcome."""
    started = admin("POST", f"/models/{kind}", body, timeout=_PATIENCE)
    ended = progress.follow(admin, started["id"])
    if as_json:
        common.emit(ended, True, str)
    raise SystemExit(progress.conclude([ended], as_json))
