"""`corral config`: what is configured, and whether it is right."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from corral.cli import common
from corral.config import settings as model

if TYPE_CHECKING:
    from corral.stack.reload import Reloaded


@click.group("config")
def command() -> None:
    """Check and show the configuration."""


def _path(config: str | None) -> str | None:
    return config or os.environ.get("CORRAL_CONFIG") or ("corral.yaml" if Path("corral.yaml").exists() else None)


@command.command("check")
@click.argument("file", required=False)
@common.options
def check(file: str | None, as_json: bool, state: str | None) -> None:
    """Check a configuration: every problem, with its line."""
    path = _path(file)
    model.load(path, whole=True)
    common.emit({"valid": True, "file": path}, as_json, lambda: f"{path or 'the defaults'}: right")


@command.command("show")
@click.option("--config", metavar="FILE", help="Configuration.")
@common.options
def show(config: str | None, as_json: bool, state: str | None) -> None:
    """Show the effective configuration: file, environment and defaults; passwords are hidden."""
    value = _hidden(model.load(_path(config)).model_dump(mode="json"))
    common.emit(value, as_json, lambda: _CHOSEN + yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip())


_CHOSEN = """\
# `corral up` takes edge.port (and edge.tls_port, edge.ollama) from here and chooses free ports for the rest, which
# `corral status` shows; the others are those of `corral serve`.
"""


@command.command("schema")
@common.options
def schema(as_json: bool, state: str | None) -> None:
    """Print the JSON Schema of corral.yaml, for editors."""
    click.echo(json.dumps(model.schema(), indent=2))


@command.command("reload")
@common.options
def reload(as_json: bool, state: str | None) -> None:
    """Apply a changed corral.yaml to the stack that runs, as far as that goes; no stream is cut.

    Nodes come and go at once, and the catalogue of models is replaced; other changes are named, and wait for a restart.
    """
    from corral.stack import reload as stack

    folder = common.folder(state)

    def ask(method: str, path: str, body: object) -> Any:
        return common.Admin(folder)(method, path, body, timeout=90.0)

    done = stack.reload(folder, ask)
    common.emit(done.as_dict(), as_json, lambda: _text(done, folder.option(os.environ)))


def _text(done: Reloaded, option: str) -> str:
    if done.file is None:
        return (
            "HAProxy has read its configuration again; the stack was started without a corral.yaml: to use one, "
            f"`corral down{option}`, then `corral up --config corral.yaml{option}`"
        )
    lines = [f"{done.file}: right; HAProxy has read its configuration again"]
    lines += [f"  applied   {what}" for what in done.applied]
    lines += [
        f"  changed   {name}: in force after `corral down{option}` and `corral up{option}`" for name in done.restart
    ]
    return "\n".join(lines if len(lines) > 1 else [*lines, "  nothing has changed"])


def _hidden(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _hidden(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_hidden(item) for item in value]
    return re.sub(r"(://[^/@]*:)[^/]*@", r"\1***@", value) if isinstance(value, str) else value
