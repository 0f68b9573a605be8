"""`corral keys`: who may call."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import click

from corral.cli import common
from corral.cli.common import Admin, rows, segment
from corral.config.values import bare, duration

_COLUMNS = (
    *("id", "name", "role", "tenant", "models", "networks", "rpm", "concurrency", "class"),
    *("expires", "last_used", "revoked"),
)
NAME_MAX = 128
WEIGHT = "Its share where keys wait for the same model; most have 1."


class Span(click.ParamType[float]):
    """A duration such as 30d, in seconds.

    With ``unit``, a bare number is refused: it is rarely meant as seconds. With ``none``, that word too, which is
    infinity. With ``some``, nothing is refused.
    """

    name = "duration"

    def __init__(self, unit: bool = False, none: bool = False, some: bool = False) -> None:
        self._unit, self._none, self._some = unit, none, some

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if self._none and value == "none":
            return math.inf
        try:
            seconds = duration(value)
            if seconds and self._unit and (number := bare(value)):
                raise ValueError(f"{number} of what? Write {number}s, {number}m, {number}h or {number}d")
            if self._some and not seconds:
                words = ", or none" if self._none else "; leave it out for none"
                raise ValueError(f"{value!r}: expected more than nothing, such as 30s or 30d{words}")
            return seconds
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Named(click.ParamType[str]):
    """The name of a key or a tenant, as the admin API takes one."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not re.fullmatch(rf"[^\x00-\x1f\x7f]{{1,{NAME_MAX}}}", text):
            self.fail(f"{text!r}: expected a name of 1 to {NAME_MAX} characters, such as my-app", param, ctx)
        return text


class Parts(click.ParamType[list[str]]):
    """A list with commas, of one part at least. ``words`` say what is expected."""

    name = "list"

    def __init__(self, words: str) -> None:
        self._words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        parts = [stripped for part in str(value).split(",") if (stripped := part.strip())]
        if not parts:
            self.fail(f"{value!r}: expected {self._words}", param, ctx)
        return parts


GLOBS = "models such as 'llama3.2:*,qwen3:8b'"
NETWORKS = "networks such as 10.1.0.0/16; leave it out for anywhere"


@click.group("keys")
def command() -> None:
    """Create, change, list, rotate and revoke keys."""


@command.command("create")
@click.argument("name", type=Named())
@click.option("--role", type=click.Choice(["inference", "operator", "admin"]), default="inference", show_default=True)
@click.option(
    "--models",
    type=Parts(f"{GLOBS}; leave it out for all"),
    metavar="GLOB,…",
    help="Models it may use.  [default: all]",
)
@click.option(
    "--networks", type=Parts(NETWORKS), metavar="CIDR,…", help="Where it may be used from.  [default: anywhere]"
)
@common.limits()
@click.option("--class", "class_", type=click.Choice(["interactive", "batch"]), help="Who goes first in a queue.")
@click.option("--expires", type=Span(unit=True, some=True), help="After how long it ends, such as 30d.")
@click.option(
    "--content", is_flag=True, default=None, help="Keep its prompts and answers, where audit.content is full."
)
@click.option(
    "--deadline",
    type=Span(unit=True, some=True),
    help="How long a request may take that does not say so: 30s, 5m.",
)
@click.option("--weight", type=click.FloatRange(0.1, 100), metavar="W", help=WEIGHT)
@click.option("--tenant", type=Named(), help="Whom it belongs to.  [default: that of the key that creates it]")
@click.option("--new-tenant", is_flag=True, help="Make the tenant where it is new; otherwise that is refused.")
@common.options
def create(as_json: bool, state: str | None, **given: Any) -> None:
    """Create a key, which may do no more than the one that creates it; it is shown once."""
    body = {name: value for name, value in given.items() if value is not None and name not in ("class_", "expires")}
    if not given["new_tenant"]:
        del body["new_tenant"]
    if given["class_"]:
        body["class"] = given["class_"]
    if given["expires"] is not None:
        body["expires"] = time.time() + given["expires"]
    admin = Admin(common.folder(state))
    made = admin("POST", "/keys", body)
    _show_once(made, as_json, "")
    for note in made.get("notes") or ():
        click.echo(f"note: {note}", err=True)
    live = [key for key in rows(admin("GET", "/keys"), "keys") if not key["revoked"]]
    if others := [key["id"] for key in live if key["name"] == made["name"] and key["id"] != made["id"]]:
        click.echo(f"note: other keys have this name too: {', '.join(others)}. Commands want the id then", err=True)


@command.command("list")
@common.options
def list_keys(as_json: bool, state: str | None) -> None:
    """List keys; their secrets are not kept."""
    listed = rows(Admin(common.folder(state))("GET", "/keys"), "keys")
    common.emit(listed, as_json, lambda: common.table([_shown(key) for key in listed], _COLUMNS, "no keys"))


@command.command("show")
@click.argument("id")
@common.options
def show(id: str, as_json: bool, state: str | None) -> None:
    """Show a key, with the limits in force: its own, or the defaults of corral.yaml."""
    key = Admin(common.folder(state))("GET", f"/keys/{segment(id)}")
    common.emit(key, as_json, lambda: common.pairs(_in_force(_shown(key))))


@command.command("update")
@click.argument("id")
@click.option("--models", type=Parts(f"{GLOBS}; '*' is all"), metavar="GLOB,…", help="Models it may use.")
@common.limits(none=True)
@click.option(
    "--deadline",
    type=Span(unit=True, none=True, some=True),
    help="How long a request may take that does not say so, or none.",
)
@click.option("--weight", type=click.FloatRange(0.1, 100), metavar="W", help=WEIGHT)
@common.options
def update(id: str, as_json: bool, state: str | None, **given: Any) -> None:
    """Change a key; what is not named stays, and a limit that is none is the default of corral.yaml.

    Keys that it made may do no more than it from then on; those that change for that are named.
    """
    models, deadline = given.pop("models"), given.pop("deadline")
    changes = common.given(given)
    if models is not None:
        changes["models"] = models
    if deadline is not None:
        changes["deadline"] = deadline if math.isfinite(deadline) else None
    if not changes:
        raise click.UsageError("name what to change, such as --rpm 600, --models 'llama3.2:*' or --deadline none")
    made = Admin(common.folder(state))("PATCH", f"/keys/{segment(id)}", changes)
    fewer = made.get("narrowed") or []
    more = f"; narrowed with it, as it made them: {', '.join(fewer)}" if fewer else ""
    common.emit(made, as_json, lambda: f"changed {id}{more}{common.late(made)}")


@command.command("rotate")
@click.argument("id")
@click.option(
    "--overlap", type=Span(unit=True), default="24h", show_default=True, help="How long the old secret still works."
)
@click.option("--end-oldest", is_flag=True, help="End what an earlier rotation left, if it still works; else refused.")
@common.options
def rotate(id: str, overlap: float, end_oldest: bool, as_json: bool, state: str | None) -> None:
    """Give a key a new secret; it is shown once."""
    how = {"overlap": overlap, "end_oldest": end_oldest}
    made = Admin(common.folder(state))("POST", f"/keys/{segment(id)}/rotate", how)
    until = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + overlap))
    _show_once(made, as_json, f"; the old text works until {until}, `--overlap 0s` ends it now" if overlap else "")


@command.command("revoke")
@click.argument("id")
@common.options
def revoke(id: str, as_json: bool, state: str | None) -> None:
    """End a key; every gateway knows within a second."""
    done = Admin(common.folder(state))("POST", f"/keys/{segment(id)}/revoke")
    common.emit(done, as_json, lambda: f"revoked {id}{common.late(done)}")


def _show_once(made: dict[str, Any], as_json: bool, more: str) -> None:
    # The key alone on standard output: it goes into a variable.
    common.emit(made, as_json, lambda: str(made["key"]))
    if not as_json:
        click.echo(f"(the key {made['id']}; its text is not shown again{more})", err=True)


def _shown(key: dict[str, Any]) -> dict[str, Any]:
    times = ("created", "expires", "last_used", "revoked_at", "rotating_until")
    shown = {**key, **{name: common.moment(key[name]) for name in times if name in key}}
    if (ends := key.get("expires")) is not None and ends <= time.time():
        shown["expires"] = f"expired {shown['expires']}"
    # A glob that no model has is what narrowing its maker has left.
    shown["models"] = [glob for glob in key.get("models") or () if glob.strip()] or "none"
    return shown


def _in_force(shown: dict[str, Any]) -> dict[str, Any]:
    limits = shown.pop("limits", {})
    for name in common.LIMITS:
        if shown.get(name) is None:
            default = limits.get(name)
            shown[name] = "none" if default is None else f"{default} (default)"
    return shown
