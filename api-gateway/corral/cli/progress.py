"""How an operation goes, on standard error: lines that are redrawn on a terminal, one for each tenth elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import click

from corral.cli.common import Admin
from corral.stack.http import Unreachable

WAIT = 5.0
EVERY = 0.25
LOST = 30.0


def follow(admin: Admin, operation: str) -> dict[str, Any]:
    """Show an operation until it has ended; how it ended. Control may be away for LOST seconds meanwhile.

    Ctrl-C ends the showing, not the operation, with exit status 1.
    """
    screen = _Screen()
    seen, answered = -1, time.monotonic()
    try:
        while True:
            try:
                told = admin("GET", f"/operations/{operation}?after={seen}&wait={WAIT:g}", timeout=30.0)
            except Unreachable:
                if time.monotonic() - answered > LOST:
                    raise
                time.sleep(1.0)
                continue
            answered = time.monotonic()
            seen = told["version"]
            screen.show(told)
            if told["state"] != "running":
                return dict(told)
            time.sleep(EVERY)
    except KeyboardInterrupt:
        click.echo(
            f"\n{operation} goes on: corral models watch {operation}, or: corral models cancel {operation}", err=True
        )
        raise SystemExit(1) from None


def conclude(ended: Sequence[dict[str, Any]], as_json: bool) -> int:
    """Say how operations ended; the exit status."""
    failed = False
    for one in ended:
        for note in one["notes"]:
            click.echo(f"note: {note}", err=True)
        for error in one["errors"]:
            click.echo(f"corral: {printable(error)}", err=True)
        failed = failed or one["state"] != "done"
        if one["state"] == "cancelled":
            click.echo(f"corral: {one['id']} was cancelled; what was done stays done", err=True)
        if not as_json and one["state"] == "done":
            click.echo("done" if one["steps"] else "nothing to do")
    return 1 if failed else 0


def what(step: dict[str, Any]) -> str:
    """A step in words."""
    source = f" from {step['source']}" if step.get("source") else ""
    return f"{step['action']} {step['model']} on {step['node']}{source}"


def line(step: dict[str, Any]) -> str:
    """A step and how far it is."""
    state, shown = step["state"], step.get("progress") or {}
    if state == "failed":
        return f"{what(step)}: FAILED: {printable(str(step['error']))}"
    if state != "running":
        return f"{what(step)}: {state}" + (f" ({step['detail']})" if step["detail"] else "")
    if total := shown.get("total"):
        layer = str(shown.get("layer") or "").removeprefix("sha256:")[:12]
        done, rate = shown.get("completed") or 0, shown.get("rate") or 0.0
        return f"{what(step)}: layer {layer} {percent(step):3d}%  {size(done)} of {size(total)}" + (
            f"  {size(rate)}/s" if rate else ""
        )
    return f"{what(step)}: {shown.get('status') or step['detail'] or 'begins'}"


def percent(step: dict[str, Any]) -> int:
    """How much of its layer has come, in percent."""
    shown = step.get("progress") or {}
    total = shown.get("total") or 0
    return int(100 * (shown.get("completed") or 0) / total) if total else 0


def printable(text: str) -> str:
    """What a node said, without what would move the operator's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def size(count: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Bar:
    """How much of something is done: a bar that is redrawn on a terminal, a line for each tenth elsewhere."""

    WIDTH = 30

    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit = what, unit
        self._live = sys.stderr.isatty()
        self._tenth = -1
        self._begun = time.monotonic()

    def show(self, done: int, total: int) -> None:
        """Take how much is done, of how much."""
        part = done / total if total else 1.0
        rate = done / max(1e-9, time.monotonic() - self._begun)
        text = f"{self._what} {int(part * 100):3d}%  {done:,} of {total:,} {self._unit}  {rate:,.0f}/s"
        if self._live:
            filled = int(part * self.WIDTH)
            sys.stderr.write(f"\r\x1b[2K[{'#' * filled}{'.' * (self.WIDTH - filled)}] {text}")
            if done >= total:
                sys.stderr.write("\n")
            sys.stderr.flush()
        elif int(part * 10) != self._tenth:
            self._tenth = int(part * 10)
            click.echo(text, err=True)


class _Screen:
    """Draws steps: over what was drawn before on a terminal, else what is new since."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._drawn = 0
        self._said: dict[int, tuple[str, str, int]] = {}

    def show(self, told: dict[str, Any]) -> None:
        """Take an operation as it is now."""
        steps = told["steps"]
        if self._live:
            lines = [line(step) for step in steps if step["state"] != "pending"]
            width = shutil.get_terminal_size().columns
            up = f"\x1b[{self._drawn}A" if self._drawn else ""
            sys.stderr.write(up + "".join(f"\x1b[2K{one[: width - 1]}\n" for one in lines))
            sys.stderr.flush()
            self._drawn = len(lines)
            return
        for number, step in enumerate(steps):
            shown = step.get("progress") or {}
            mark = (step["state"], str(shown.get("layer") or shown.get("status")), percent(step) // 10)
            if step["state"] != "pending" and self._said.get(number) != mark:
                self._said[number] = mark
                click.echo(line(step), err=True)
