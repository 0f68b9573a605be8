"""The ``corral`` command."""

from __future__ import annotations

import difflib
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
    "requests": "requests",
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
        try:
            module = importlib.import_module(f"corral.cli.{_COMMANDS[cmd_name]}")
        except KeyboardInterrupt:
            click.echo("corral: interrupted", err=True)
            raise SystemExit(1) from None
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of the words; one that is none is refused with what may have been meant."""
        word = args[0]
        if word not in _COMMANDS and not word.startswith("-"):
            near = difflib.get_close_matches(word, _COMMANDS, 1)
            if len(args) > 1 and args[1] in _COMMANDS:
                near = [f"{args[1]} {word}"]
            ctx.fail(f"No such command {word!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="corral", message=f"%(prog)s %(version)s{_compiled()}")
def cli() -> None:
    """Corral: the production platform for self-hosted LLMs on Ollama."""


def main() -> None:
    """Run the command line; exit status 0 done, 1 failed, 2 wrong usage."""
    cli(prog_name="corral")
