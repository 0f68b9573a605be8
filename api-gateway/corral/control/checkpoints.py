"""The checkpoints page by page: the file of them grows for years, and nobody needs all of it at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from corral.store.chain import read_checkpoint
from corral.store.checkpoints import lines_after
from corral.store.database import Database
from corral.store.verify import PAGE

AT_ONCE = PAGE
STEP = 1000
"""Of each such number of lines it is kept where the next one begins: a page is found without those before it."""


class Found(NamedTuple):
    """Lines of the file; where they are its last ones, ``size`` says how many it has, and ``last`` is the last one."""

    lines: list[bytes]
    size: int | None = None
    last: bytes = b""


class Lines:
    """The whole lines of a file that others append to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begins: list[tuple[int, int]] = []  # where each step begins, and the hash of its first line
        self._lock = threading.Lock()

    def read(self, after: int, limit: int) -> Found:
        """The next lines behind the first `after`, with their ends. Raises OSError."""
        with self._lock:
            try:
                with self._path.open("rb") as file:
                    return self._read(file, after, limit)
            except FileNotFoundError:
                return Found([], 0)

    def _read(self, file: BinaryIO, after: int, limit: int) -> Found:
        number, position = self._near(file, after)
        file.seek(position)
        found, last = list[bytes](), b""
        for line in file:
            if not line.endswith(b"\n"):  # it is being written, or a crash has cut it
                break
            if number == len(self._begins) * STEP:
                self._begins.append((position, hash(line)))
            if number >= after:
                found.append(line)
            number, position, last = number + 1, position + len(line), line
            if len(found) == limit:
                return Found(found)
        return Found(found, number, last)

    def _near(self, file: BinaryIO, after: int) -> tuple[int, int]:
        """The number of a line that is not behind the first `after`, and where it begins; the first one, where the
        file is not the one any more that it was."""
        while self._begins:
            step = min(after // STEP, len(self._begins) - 1)
            position, known = self._begins[step]
            file.seek(position)
            if hash(file.readline()) == known:
                return step * STEP, position
            self._begins.clear()
        return 0, 0


async def page(lines: Lines, database: Database, after: int, limit: int | None = None) -> list[bytes]:
    """The next checkpoints behind the first `after`, AT_ONCE where there is no `limit`, as lines with their ends: those
    of the file, and behind its end what the database has. Another control, or this one just now, may have signed what
    is not in the file yet.

    Behind a line that is no checkpoint there is nothing: `verify` says what it is.
    """
    limit = AT_ONCE if limit is None else limit
    found = await asyncio.to_thread(lines.read, after, limit)
    if found.size is None:
        return found.lines
    try:
        last = read_checkpoint(found.last).checkpoint.number if found.size else 0
    except ValueError:
        return found.lines
    behind = min(last + max(0, after - found.size), 2**63 - 1)
    more = await database.read(lines_after, behind, limit - len(found.lines))
    return found.lines + [line.encode() + b"\n" for line in more]


async def pages(lines: Lines, database: Database, after: int, some: list[bytes]) -> AsyncIterator[bytes]:
    """All of them, a page after the other; `some` is the first one."""
    while some:
        yield b"".join(some)
        after += len(some)
        some = await page(lines, database, after) if len(some) == AT_ONCE else []
