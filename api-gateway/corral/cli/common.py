"""What every command shares: --json, --state, errors, and asking the admin API."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

import click

from corral.config.errors import ConfigError
from corral.stack import http
from corral.stack.state import StackError, StateFolder, running

LIMITS = ("rpm", "tpm", "concurrency", "daily_tokens", "monthly_tokens")

Function = TypeVar("Function", bound=Callable[..., Any])


def options(function: Function) -> Function:
    """Add --json and --state, and turn the errors a command may raise into exit status 1."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ConfigError, StackError, http.Unreachable) as error:
            fail(str(error), kwargs.get("as_json", False))
        except BrokenPipeError:
            unread()  # the reader (head, less) has enough
            raise SystemExit(1) from None

    state = click.option("--state", metavar="DIR", help="State folder.  [default: ~/.local/state/corral]")
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    return as_json(state(wrapped))  # type: ignore[return-value]


def fail(message: str, as_json: bool = False) -> NoReturn:
    """End with status 1 and the reason on standard error (as JSON too, on standard output, with --json)."""
    if as_json:
        click.echo(json.dumps({"error": {"code": "failed", "message": message}}))
    lines = message.splitlines() or ["failed"]
    click.echo("\n".join(f"corral: {line}" if number == 0 else line for number, line in enumerate(lines)), err=True)
    raise SystemExit(1)


def folder(state: str | None) -> StateFolder:
    """The state folder of a command."""
    return StateFolder.locate(state, os.environ)


def emit(value: object, as_json: bool, text: Callable[[], str]) -> None:
    """Print ``value`` as JSON, or ``text()``."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text())


def moment(epoch: object) -> object:
    """A time of the API's (epoch seconds) as one reads it, in this machine's zone; anything else as it is."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(epoch)) if isinstance(epoch, int | float) else epoch


class Limit(click.ParamType[int]):
    """A limit: a whole number. With ``none``, that word too, which is 0."""

    name = "n"

    def __init__(self, none: bool = False) -> None:
        self._none = none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        if self._none and text == "none":
            return 0
        if not (text.isascii() and text.isdecimal() and int(text) >= 1):
            words = ", or none" if self._none else "; leave it out for the default"
            self.fail(f"{text!r}: expected a whole number of at least 1, such as 1000{words}", param, ctx)
        return int(text)


def limits(none: bool = False, of: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options of all limits, of what ``of`` says; with ``none``, that word takes one away."""
    helps = {
        "rpm": f"Requests a minute{of}.",
        "tpm": "Tokens a minute.",
        "concurrency": "Requests at once.",
        "daily-tokens": "Tokens a day (UTC).",
        "monthly-tokens": "Tokens a month (UTC).",
    }

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for name, text in reversed(helps.items()):
            function = click.option(f"--{name}", type=Limit(none), metavar="N", help=text)(function)
        return function

    return add


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were named; a limit that is none is null."""
    return {name: value or None for name, value in options.items() if value is not None}


def key_names(admin: Admin) -> dict[Any, str]:
    """The names of keys by their ids, for people alone: that keys were read is in the trail, too."""
    return {key["id"]: key["name"] for key in rows(admin("GET", "/keys"), "keys")}


def unread() -> None:
    """Nobody takes standard output any more: nothing may be flushed into it as Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], empty: str) -> str:
    """Rows under upper-case headings; ``empty`` where there are none."""
    if not rows:
        return empty
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(name), *(len(row[at]) for row in cells)) for at, name in enumerate(columns)]
    lines = [[name.upper().replace("_", " ") for name in columns], *cells]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def pairs(fields: Mapping[str, Any]) -> str:
    """One field a line."""
    width = max((len(name) for name in fields), default=0)
    return "\n".join(f"{name.ljust(width)}  {_cell(value)}" for name, value in fields.items())


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ",".join(str(item) for item in value) or "-"
    # What a caller sent (a model's name, say) must not move the operator's cursor.
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))


class Admin:
    """The admin API: of ``$CORRAL_URL``, or of the stack of the state folder."""

    def __init__(self, state: StateFolder) -> None:
        self.url = os.environ.get("CORRAL_URL", "").rstrip("/")
        self.key = os.environ.get("CORRAL_ADMIN_KEY", "")
        if self.url and not re.match(r"https?://[^/]", self.url):
            wanted = "expected an address such as http://127.0.0.1:8080 or https://llm.example.com"
            raise StackError(f"CORRAL_URL: {wanted}, got {self.url!r}")
        if not self.url:
            stack = state.stack() or {}
            if not running(state) or "url" not in stack:
                raise state.nothing_runs(", or set CORRAL_URL")
            self.url = str(stack["url"])
            self.key = self.key or _read_key(state.admin_key)
        if not self.key and (file := os.environ.get("CORRAL_ADMIN_KEY_FILE")):
            self.key = _read_key(Path(file))
        if not self.key:
            raise StackError("CORRAL_URL is set but CORRAL_ADMIN_KEY is not")

    def __call__(self, method: str, path: str, body: object = None, timeout: float = 30.0) -> Any:
        """The answer's JSON. StackError with the API's own words for a status of 400 and above."""
        return self._asked(method, path, body, timeout).json()

    def raw(self, path: str, timeout: float = 60.0) -> bytes:
        """The body of what is at a path. StackError as above."""
        return self._asked("GET", path, None, timeout).body

    def _asked(self, method: str, path: str, body: object, timeout: float) -> http.Answer:
        answer = http.request(self.url, method, "/admin" + path, body=body, key=self.key, timeout=timeout)
        if answer.status >= 400:
            value = answer.json()
            error = value.get("error") if isinstance(value, dict) else None
            message = error.get("message") if isinstance(error, dict) else error
            raise StackError(str(message or f"{method} {path}: status {answer.status}"))
        return answer


def _read_key(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise StackError(f"{path} cannot be read: {error.strerror}") from None


def rows(value: Any, name: str) -> list[dict[str, Any]]:
    """The list in an answer: bare, or under its noun."""
    listed = value.get(name, []) if isinstance(value, dict) else value
    return [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []


def late(done: Mapping[str, Any]) -> str:
    """What is said of gateways that have not taken note of a change; "" where all have."""
    names = done.get("gateways", {}).get("pending", [])
    return f"; not yet acknowledged by {', '.join(names)}" if names else ""


def segment(text: str) -> str:
    """A name as one segment of a path."""
    return quote(text, safe="")
