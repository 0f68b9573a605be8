"""The gateway's written record: the spool (audit, usage) and the access log, both committed in groups.

All records of one turn of the event loop are one write; what depends on a record (the upstream connect, the
last bytes of an answer) runs right after that write; with ``audit.durability: synced``, once the disk has it.

While the spool is full, or the disk takes nothing, requests are shed with a 503 before any node hears of them. Those
have no record, or a full disk would become a full memory; they are counted. Whose admission was recorded before has its
end recorded too, also where no node ever hears of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Final

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from corral.gateway.access import AccessLog
from corral.gateway.records import Admitted, Progress, Settled
from corral.store.spool import SpoolWriter

log = logging.getLogger(__name__)
_encode: Final = msgspec.json.Encoder().encode


def _has_content(record: msgspec.Struct) -> bool:
    return isinstance(record, Settled) and record.content is not UNSET


class Waiter:
    """What waits for its record; by itself nothing. A base: a callable would be made anew for each record."""

    def recorded(self, written: bool) -> None:
        """The record is in the spool, or (not `written`) could not be."""


NOBODY: Final = Waiter()
PAUSE_MAX: Final = 30.0


class Journal:
    """Spool and access log of one gateway.

    ``failing`` is set while the disk takes no records, ``full`` while the spool holds as much as it may; ``shed``
    counts requests that were refused for that and have no record.
    """

    def __init__(self, folder: Path, access_log: str, loop: asyncio.AbstractEventLoop, synced: bool = False) -> None:
        self.spool = SpoolWriter(folder, synced=synced)
        self._loop = loop
        self._synced = synced
        self._syncing = -1
        self._closing = False
        self._waiting: list[Waiter] = []
        self._written: list[Waiter] = []
        self._shed: list[Waiter] = []
        self.access = AccessLog(access_log, loop)
        self.failing = False
        self.full = False
        self.shed = 0
        self._shedding_since = 0.0

    def record(self, record: msgspec.Struct, waiter: Waiter, access: bool = False, follows: bool = False) -> bool:
        """Append a record; `waiter` hears, after the group's write, whether it is in the spool. False: it was shed.

        `access`: it is a line of the access log too. `follows`: its request's admission was appended, so it is needed.
        """
        payload = _encode(record)
        waiting = self._waiting
        if not waiting and not self._shed:
            self._loop.call_soon(self._commit)
        shed = (self.failing or self.full) and self._sheds(record, follows)
        if shed:
            self._shed.append(waiter)
        else:
            self.spool.append(payload)
            waiting.append(waiter)
        if access:
            self.access.line(payload if not _has_content(record) else _encode(replace(record, content=UNSET)))
        return not shed

    def pause(self, now: float) -> float:
        """For how long who was shed is to stay away: nobody knows when the disk takes records again, so for as long as
        it has taken none, within bounds. `now` is monotonic seconds."""
        self._shedding_since = self._shedding_since or now
        return min(now - self._shedding_since, PAUSE_MAX)

    def _sheds(self, record: msgspec.Struct, follows: bool) -> bool:
        """Whether a record is of a request that the spool knows nothing of. One that it has the begin of is ended, and
        how far it is stays known as long as the disk takes that: it is less than what its end may be."""
        if isinstance(record, Settled):
            if follows:
                return False
            self.shed += 1
            return True
        return isinstance(record, Admitted) or (self.failing and isinstance(record, Progress))

    def _commit(self) -> None:
        if self._syncing >= 0:
            return  # one group after the other: this one is written when that one is on the disk
        if not (self._waiting or self._shed):
            return  # nothing is left: `close` has written it, or a sync had it all
        waiting, self._waiting = self._waiting, []
        shed, self._shed = self._shed, []
        try:
            self.spool.flush()
        except OSError as error:
            if not self.failing:
                log.error("the spool takes no records: %s", error)
            self.failing = True
        else:
            self.failing = False
        if shed:
            self._tell(shed, False)
        if self._synced and not self.failing:
            self._written, self._syncing = waiting, self.spool.descriptor()
            if self._closing:
                self._sync()
            else:
                self._loop.run_in_executor(None, os.fdatasync, self._syncing).add_done_callback(self._on_disk)
            return
        self._tell(waiting, not self.failing)

    def _on_disk(self, done: asyncio.Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        if self._syncing >= 0:  # else `close` has waited for it
            self._synced_to(error)

    def _sync(self) -> None:
        """Wait for the disk: the loop will not run on."""
        try:
            os.fdatasync(self._syncing)
        except OSError as error:
            self._synced_to(error)
        else:
            self._synced_to(None)

    def _synced_to(self, error: BaseException | None) -> None:
        os.close(self._syncing)
        self._syncing = -1
        written, self._written = self._written, []
        if error is not None:
            log.error("the spool is not on its disk: %s", error)
            self.failing = True
        self._tell(written, error is None)
        self._commit()

    def _tell(self, waiting: list[Waiter], written: bool) -> None:
        if written and not self.full:
            self._shedding_since = 0.0
        for waiter in waiting:
            try:
                waiter.recorded(written)
            except Exception:
                # One request's fault must not keep the others of its group waiting for ever.
                log.exception("what waited for a record failed")

    def close(self) -> None:
        """Write what waits, with `synced` until the disk has it, and close."""
        self._closing = True
        if self._syncing >= 0:
            self._sync()
        self._commit()
        self.access.close()
        try:
            self.spool.close()
        except OSError as error:
            log.error("the spool was not closed cleanly: %s", error)
