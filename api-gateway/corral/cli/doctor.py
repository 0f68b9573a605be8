"""`corral doctor`: what is wrong and what to do about it."""

from __future__ import annotations

import click

from corral.cli import common
from corral.stack import doctor
from corral.stack.doctor import Finding
from corral.stack.state import StackError

PATIENCE = 10.0
"""Seconds in which control answers, or something is wrong."""


@click.command("doctor")
@common.options
def command(as_json: bool, state: str | None) -> None:
    """Look for what is wrong; every finding says what to do. Exit status 1 if there is a problem."""
    folder = common.folder(state)
    try:
        admin = common.Admin(folder)
    except StackError:
        found = doctor.examine(folder, None)
    else:
        found = doctor.examine(folder, lambda path: admin("GET", path, timeout=PATIENCE))
    failed = any(item.level == "problem" for item in found)
    common.emit(
        {"healthy": not failed, "findings": [item.as_dict() for item in found]},
        as_json,
        lambda: "\n".join(_line(item) for item in found),
    )
    raise SystemExit(1 if failed else 0)


def _line(item: Finding) -> str:
    mark = {"ok": "ok       ", "warning": "warning  ", "problem": "PROBLEM  "}[item.level]
    text = f"{mark}{item.check}: {item.seen}"
    return text + (f"\n         → {item.advice}" if item.advice else "")
