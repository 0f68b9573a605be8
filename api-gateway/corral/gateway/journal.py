"""The gateway's written record: the spool (audit, usage) and the access log, both committed in groups.

All records of one turn of the event loop are one write; what depends on a record (the upstream connect, the
last bytes of an answer) runs right after that write.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from corral.store.spool import SpoolWriter

ACCESS_FLUSH = 0.05

log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode

Then = Callable[[bool], None]


class Journal:
    """Spool and access log of one gateway. ``failing`` is set while the disk takes no records."""

    def __init__(self, folder: Path, access_log: str, loop: asyncio.AbstractEventLoop) -> None:
        self.spool = SpoolWriter(folder)
        self._append = self.spool.append
        self._loop = loop
        self._waiting: list[Then] = []
        self._lines: list[bytes] = []
        self._fd = -1
        self._owned = False
        self.failing = False
        if access_log == "-":
            self._fd = sys.stdout.fileno()
        elif access_log:
            self._fd = os.open(access_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._owned = True

    def record(self, record: msgspec.Struct, then: Then, access: bool = False) -> None:
        """Append a record; `then` hears, after the group's write, whether it is in the spool.

        `access`: it is a line of the access log too.
        """
        payload = _encode(record)
        self._append(payload)
        waiting = self._waiting
        if not waiting:
            self._loop.call_soon(self._commit)
        waiting.append(then)
        if access and self._fd >= 0:
            if not self._lines:
                self._loop.call_later(ACCESS_FLUSH, self.flush_access)
            self._lines.append(payload)

    def _commit(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            self.spool.flush()
        except OSError as error:
            if not self.failing:
                log.error("the spool takes no records: %s", error)
            self.failing = True
        else:
            self.failing = False
        written = not self.failing
        for then in waiting:
            then(written)

    def flush_access(self) -> None:
        """Write the lines that wait."""
        lines, self._lines = self._lines, []
        if lines:
            try:
                os.write(self._fd, b"\n".join(lines) + b"\n")
            except OSError as error:
                log.error("the access log takes no lines: %s", error)

    def close(self) -> None:
        """Write what waits and close."""
        self._commit()
        self.flush_access()
        try:
            self.spool.close()
        except OSError as error:
            log.error("the spool was not closed cleanly: %s", error)
        if self._owned:
            os.close(self._fd)


def nothing(written: bool) -> None:
    """For a record that nothing waits for."""
