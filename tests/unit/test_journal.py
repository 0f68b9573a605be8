"""How records of the journal are put on the disk together."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from corral.gateway.journal import Journal, Waiter
from corral.gateway.records import Begun

CALLERS = 20


class Caller(Waiter):
    """Waits for a record, and writes the next one at once, as a connection does."""

    def __init__(self, journal: Journal, told: list[bool], enough: asyncio.Event) -> None:
        self.journal, self.told, self.enough = journal, told, enough

    def recorded(self, written: bool) -> None:
        self.told.append(written)
        if len(self.told) <= 2 * CALLERS:
            self.journal.record(Begun("g", 1.0), self)
        if len(self.told) == 3 * CALLERS:
            self.enough.set()


def test_all_that_wait_while_the_disk_is_busy_share_the_next_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs, told = [0], []
    entered, free = threading.Event(), threading.Event()

    def sync(descriptor: int) -> None:
        syncs[0] += 1
        entered.set()
        assert free.wait(30)

    monkeypatch.setattr(os, "fdatasync", sync)

    async def run() -> None:
        journal = Journal(tmp_path, "", asyncio.get_running_loop(), synced=True)
        enough = asyncio.Event()
        callers = [Caller(journal, told, enough) for _ in range(CALLERS)]
        journal.record(Begun("g", 1.0), callers[0])
        assert await asyncio.to_thread(entered.wait, 30)
        for caller in callers[1:]:  # each in a turn of its own, while the first one's sync is on
            journal.record(Begun("g", 1.0), caller)
            await asyncio.sleep(0)
        assert (syncs, told) == ([1], [])
        free.set()
        await asyncio.wait_for(enough.wait(), 30)
        journal.close()

    asyncio.run(run())
    assert all(told)
    # The first alone, then as many together as there were: 3 rounds of 20 records, and the one that was ahead.
    assert syncs[0] <= 5, f"{len(told)} records took {syncs[0]} syncs"
