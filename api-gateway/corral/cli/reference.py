"""docs/cli.md, made of the commands themselves: `python -m corral.cli.reference > docs/cli.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from corral.cli.main import cli

_INTRODUCTION = """\
# Commands

Made of the commands (`api-gateway/corral/cli`): `../.venv/bin/python -m corral.cli.reference`, in `api-gateway`.

Every command takes `--json`, for programs, and `--state DIR` (or `CORRAL_STATE`), the folder of the stack that is
meant. Exit status: 0 done, 1 failed (one line on standard error, which begins with `corral:`, says why), 2 wrong usage.
Commands for a Corral that runs elsewhere take its address from `CORRAL_URL` and an admin key from `CORRAL_ADMIN_KEY`,
or from the file that `CORRAL_ADMIN_KEY_FILE` names.
"""
_EVERYWHERE = {"--json", "--state", "--help"}


def commands(group: click.Command = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, by its words: ("keys", "create")."""
    if not isinstance(group, click.Group):
        yield path, group
        return
    context = click.Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        assert found is not None
        yield from commands(found, (*path, name))


def usage(path: tuple[str, ...], command: click.Command) -> str:
    """The line to type, without what every command takes."""
    context = click.Context(command, info_name=" ".join(("corral", *path)))
    arguments = [param.make_metavar(context) for param in command.params if isinstance(param, click.Argument)]
    return " ".join(("corral", *path, *arguments))


def options(command: click.Command) -> Iterator[tuple[str, str]]:
    """(how it is written, what it means) of each option but those that every command takes."""
    context = click.Context(command)
    for param in (one for one in command.params if isinstance(one, click.Option)):
        record = param.get_help_record(context)
        if record is not None and not _EVERYWHERE & set(param.opts):
            yield record


def page() -> str:
    """The whole of docs/cli.md."""
    parts = [_INTRODUCTION]
    noun = ""
    for path, command in commands():
        if path[0] != noun:
            noun = path[0]
            parts.append(f"\n## {noun}\n")
        said = " ".join((command.help or "").split("\n\n")[0].split())
        parts.append(f"\n`{usage(path, command)}`\n\n{said}\n")
        listed = list(options(command))
        if listed:
            rows = [f"| `{_cell(written)}` | {_cell(meaning)} |" for written, meaning in listed]
            parts.append("\n| option | meaning |\n|---|---|\n" + "\n".join(rows) + "\n")
    return "".join(parts)


def _cell(text: str) -> str:
    """On one line, its bars no borders of the table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())
