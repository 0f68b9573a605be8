"""`corral serve`: one part in the foreground; what containers, units and `corral up` run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from corral.cli import common
from corral.config.settings import load
from corral.stack.state import StackError


@click.group("serve")
def command() -> None:
    """Run one part in the foreground (for containers and units)."""


def _settings(config: str | None, changes: dict[str, str | None]) -> Any:
    given = {name: value for name, value in changes.items() if value is not None}
    return load(config or os.environ.get("CORRAL_CONFIG"), {**os.environ, **given})


@command.command("gateway")
@click.option("--config", metavar="FILE", help="Configuration.")
@click.option("--name", help="Name in the fleet.")
@click.option("--listen", metavar="HOST:PORT", help="Where to listen.")
@common.options
def gateway(config: str | None, name: str | None, listen: str | None, as_json: bool, state: str | None) -> None:
    """Run a gateway."""
    from corral.gateway.main import run

    run(_settings(config, {"CORRAL_GATEWAY__NAME": name, "CORRAL_GATEWAY__LISTEN": listen}))


@command.command("control")
@click.option("--config", metavar="FILE", help="Configuration.")
@click.option("--listen", metavar="HOST:PORT", help="Where to listen.")
@click.option("--new-pepper", is_flag=True, help="If the pepper is lost: make a new one and revoke all keys.")
@common.options
def control(config: str | None, listen: str | None, new_pepper: bool, as_json: bool, state: str | None) -> None:
    """Run the control plane."""
    from corral.control.main import run

    run(_settings(config, {"CORRAL_CONTROL__LISTEN": listen, "CORRAL_CONTROL__STATE": state}), new_pepper)


@command.command("node")
@click.option("--listen", metavar="HOST:PORT", default="127.0.0.1:11434", show_default=True)
@click.option("--backend", type=click.Choice(["llama", "simulated"]), default="llama", show_default=True)
@click.option("--models", type=click.Path(path_type=Path), default=Path("models"), help="Folder of its models.")
@click.option("--threads", type=click.IntRange(1), help="Threads of a model.  [default: the cores it may use]")
@click.option("--parallel", type=click.IntRange(1), default=4, show_default=True, help="Requests at once per model.")
@click.option("--max-loaded", type=click.IntRange(1), default=3, show_default=True, help="Models resident at once.")
@click.option("--default-model", help="Made from SmolLM2's wheel where the folder is empty.", default="smollm2:135m")
@click.option("--simulated", metavar="FILE", help="What a simulated node is like (JSON).")
@common.options
def node(simulated: str | None, as_json: bool, state: str | None, **chosen: Any) -> None:
    """Run an embedded node, which speaks Ollama's API."""
    from corral.node.main import run

    if chosen["threads"] is None:
        chosen["threads"] = len(os.sched_getaffinity(0))
    described = None
    if simulated:
        try:
            described = json.loads(Path(simulated).read_text())
        except (OSError, ValueError) as error:
            raise StackError(f"--simulated: {simulated} cannot be read: {error}") from None
    run(simulated=described, **chosen)
