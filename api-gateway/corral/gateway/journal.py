"""The gateway's written record: the spool (audit, usage) and the access log, both committed in groups.

All records of one turn of the event loop are one write; what depends on a record (the upstream connect, the
last bytes of an answer) runs right after that write.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from corral.gateway.access import AccessLog
from corral.store.spool import SpoolWriter

log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


class Waiter:
    """What waits for its record; by itself nothing. A base: a callable would be made anew for each record."""

    def recorded(self, written: bool) -> None:
        """The record is in the spool, or (not `written`) could not be."""


NOBODY = Waiter()


class Journal:
    """Spool and access log of one gateway. ``failing`` is set while the disk takes no records."""

    def __init__(self, folder: Path, access_log: str, loop: asyncio.AbstractEventLoop) -> None:
        self.spool = SpoolWriter(folder)
        self._loop = loop
        self._waiting: list[Waiter] = []
        self.access = AccessLog(access_log, loop)
        self.failing = False

    def record(self, record: msgspec.Struct, waiter: Waiter, access: bool = False) -> None:
        """Append a record; `waiter` hears, after the group's write, whether it is in the spool.

        `access`: it is a line of the access log too.
        """
        payload = _encode(record)
        self.spool.append(payload)
        waiting = self._waiting
        if not waiting:
            self._loop.call_soon(self._commit)
        waiting.append(waiter)
        if access:
            self.access.line(payload)

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
        for waiter in waiting:
            try:
                waiter.recorded(written)
            except Exception:
                # One request's fault must not keep the others of its group waiting for ever.
                log.exception("what waited for a record failed")

    def close(self) -> None:
        """Write what waits and close."""
        self._commit()
        self.access.close()
        try:
            self.spool.close()
        except OSError as error:
            log.error("the spool was not closed cleanly: %s", error)
