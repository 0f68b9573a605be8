"""The access log: one JSON line a request, written in groups, rotated by size."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Final

FLUSH: Final = 0.05
BYTES_MAX: Final = 64 << 20
KEEP: Final = 3

log = logging.getLogger(__name__)


class AccessLog:
    """Lines for `path`: "-" is standard output, "" none at all.

    A file that has reached `bytes_max` becomes ``.1``, and what was that ``.2``, up to `keep`; who follows it by name
    sees a new file and misses nothing.
    """

    def __init__(
        self, path: str, loop: asyncio.AbstractEventLoop, bytes_max: int = BYTES_MAX, keep: int = KEEP
    ) -> None:
        self._path = Path(path) if path not in ("", "-") else None
        self._loop = loop
        self._bytes_max, self._keep = bytes_max, keep
        self._lines: list[bytes] = []
        self._fd = sys.stdout.fileno() if path == "-" else -1
        self._size = 0
        if self._path is not None:
            self._open(self._path)

    def _open(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._size = os.fstat(self._fd).st_size

    def line(self, line: bytes) -> None:
        """Add a line, without its end."""
        if self._fd < 0:
            return
        if not self._lines:
            self._loop.call_later(FLUSH, self.flush)
        self._lines.append(line)

    def flush(self) -> None:
        """Write the lines that wait."""
        lines, self._lines = self._lines, []
        if not lines or self._fd < 0:
            return
        try:
            self._size += os.write(self._fd, b"\n".join(lines) + b"\n")
            if self._path is not None and self._size >= self._bytes_max:
                self._rotate(self._path)
        except OSError as error:
            log.error("the access log takes no lines: %s", error)

    def _rotate(self, path: Path) -> None:
        for number in range(self._keep - 1, 0, -1):
            older = path.with_name(f"{path.name}.{number}")
            if older.exists():
                older.replace(path.with_name(f"{path.name}.{number + 1}"))
        path.replace(path.with_name(f"{path.name}.1"))
        old = self._fd
        self._open(path)
        os.close(old)

    def close(self) -> None:
        """Write what waits and close."""
        self.flush()
        if self._path is not None and self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
