"""`corral logs`: the access log and every program's own, as one."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import click

from corral.cli import common
from corral.config.reader import hint
from corral.stack.state import StackError

_POLL = 0.2
_TAIL_BYTES = 1 << 20


@click.command("logs")
@click.option("--follow", "-f", is_flag=True, help="Go on with what is written from now.")
@click.option(
    "--lines", "-n", type=click.IntRange(0), default=50, show_default=True, help="Lines of each to begin with."
)
@click.option("--program", multiple=True, help="This program's alone (repeatable), such as gateway-1.")
@common.options
def command(follow: bool, lines: int, program: tuple[str, ...], as_json: bool, state: str | None) -> None:
    """Show the logs: one access-log line (JSON) a request, and what the programs say."""
    folder = common.folder(state).logs
    if not folder.is_dir():
        raise StackError(f"there are no logs in {folder}")
    known = sorted({path.name.split(".")[0] for path in folder.glob("*.log")})
    for name in program:
        if name not in known:
            raise StackError(f"{folder} has no log of {name!r}{hint(name, known)}; there are {', '.join(known)}")
    tails: dict[Path, Tail] = {}
    try:
        _look(folder, program, tails, lines)
        begin = [(stamp, path, line) for path, tail in tails.items() for stamp, line in tail.last()]
        for _, path, line in sorted(begin, key=lambda item: item[0]):
            _print(path, line, as_json)
        if not begin and not follow and lines:
            click.echo(f"corral: nothing is in {', '.join(map(str, tails)) or folder} yet", err=True)
        while follow:
            _look(folder, program, tails, None)
            quiet = True
            for path, tail in tails.items():
                for text in tail.fresh():
                    quiet = False
                    _print(path, text, as_json)
            if quiet:
                time.sleep(_POLL)
    except KeyboardInterrupt:
        return
    finally:
        for tail in tails.values():
            tail.close()


def _look(folder: Path, programs: tuple[str, ...], tails: dict[Path, Tail], lines: int | None) -> None:
    for path in sorted(folder.glob("*.log")):
        if path not in tails and (not programs or path.name.split(".")[0] in programs):
            with contextlib.suppress(FileNotFoundError):  # rotated just now: it is there at the next look
                tails[path] = Tail(path, lines)


def _print(path: Path, line: str, as_json: bool) -> None:
    name = path.name.removesuffix(".log").removesuffix(".access")
    shown = "".join(letter if letter.isprintable() or letter == "\t" else "?" for letter in line)
    if not as_json:
        click.echo(f"{name.ljust(10)} {shown}")
        return
    record: object = shown
    if path.name.endswith(".access.log"):
        try:
            record = json.loads(line)
        except ValueError:
            record = shown
    click.echo(json.dumps({"program": name, "line": record}, ensure_ascii=False))


class Tail:
    """The end of a log file, and what is added to it; a rotated file is opened anew.

    ``lines`` to begin with; None for a file that is new, of which all is still to be told.
    """

    def __init__(self, path: Path, lines: int | None) -> None:
        self._path = path
        self._rest = b""
        self._last: list[str] = []
        self._file = path.open("rb")
        if lines is None:
            return
        size = os.fstat(self._file.fileno()).st_size
        start = max(0, size - _TAIL_BYTES)
        self._file.seek(start)
        data = self._file.read(size - start)
        complete, _, self._rest = data.rpartition(b"\n")
        texts = complete.decode(errors="replace").splitlines()[1 if start else 0 :]
        self._last = texts[-lines:] if lines else []

    def last(self) -> Iterator[tuple[float, str]]:
        """(time, line) of the lines to begin with; a line without a time belongs to the one before."""
        stamp = 0.0
        for line in self._last:
            stamp = _stamp(line) or stamp
            yield stamp, line

    def fresh(self) -> list[str]:
        """Complete lines written since."""
        data = self._file.read()
        # Of a file that is rotated just now there may be no new one yet.
        with contextlib.suppress(FileNotFoundError):
            seen = os.stat(self._path)
            mine = os.fstat(self._file.fileno())
            if seen.st_ino != mine.st_ino:
                new = self._path.open("rb")
                # What was written to the old one before it was put aside, behind what was read above.
                data += self._file.read()
                self._file.close()
                self._file = new
                data += new.read()
            elif seen.st_size < self._file.tell():
                self._file.seek(0)
        complete, newline, self._rest = (self._rest + data).rpartition(b"\n")
        return complete.decode(errors="replace").splitlines() if newline else []

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _stamp(line: str) -> float:
    """Seconds since the epoch of a line: an access record's ``ts``, or a date and time at its beginning."""
    if line.startswith("{"):
        try:
            record = json.loads(line)
            return float(record.get("ts", 0)) if isinstance(record, dict) else 0.0
        except (ValueError, TypeError):
            return 0.0
    try:
        return time.mktime(time.strptime(line[:19].replace("T", " "), "%Y-%m-%d %H:%M:%S"))
    except ValueError:
        return 0.0
