"""The ``corral`` command."""

from __future__ import annotations

import importlib
import importlib.util

import click

from corral import __version__

# Noun → module; loaded when it is asked for, so that `corral serve` and `corral status` start fast.
_COMMANDS = {
    "up": "up",
    "down": "down",
    "status": "status",
    "doctor": "doctor",
    "keys": "keys",
    "tenants": "tenants",
    "nodes": "nodes",
    "models": "models",
    "usage": "usage",
    "audit": "audit",
    "backup": "backup",
    "config": "config",
    "logs": "logs",
    "loadtest": "loadtest",
    "serve": "serve",
}


def _compiled() -> str:
    """Whether this is what scripts/compile or the image's build made of the request path."""
    found = importlib.util.find_spec("corral.wire.http1")
    return "" if found is None or str(found.origin).endswith(".py") else ", request path compiled"


class Commands(click.Group):
    """The commands, in the order in which one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"corral.cli.{_COMMANDS[cmd_name]}")
        command: click.Command = module.command
        return command


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="corral", message=f"%(prog)s %(version)s{_compiled()}")
def cli() -> None:
    """Corral: the production platform for self-hosted LLMs on Ollama."""


def main() -> None:
    """Run the command line; exit status 0 done, 1 failed, 2 wrong usage."""
    cli(prog_name="corral")
