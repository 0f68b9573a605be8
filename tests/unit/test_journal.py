"""How records of the journal are put on the disk together."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from threading import Semaphore

import pytest

from corral.gateway.journal import NOBODY, Journal
from corral.gateway.records import Begun

CALLERS = 20
ROUNDS = 3


def test_all_that_wait_while_the_disk_is_busy_share_the_next_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, free = Semaphore(0), Semaphore(0)
    sizes: list[int] = []

    def sync(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        entered.release()
        assert free.acquire(timeout=30)

    monkeypatch.setattr(os, "fdatasync", sync)

    async def run() -> None:
        journal = Journal(tmp_path, "", asyncio.get_running_loop(), synced=True)
        journal.record(Begun("g", 1.0), NOBODY)
        for _ in range(ROUNDS):
            assert await asyncio.to_thread(entered.acquire, timeout=30)
            for _ in range(CALLERS):  # each in a turn of its own, while that sync is on
                journal.record(Begun("g", 1.0), NOBODY)
                await asyncio.sleep(0)
            free.release()
        assert await asyncio.to_thread(entered.acquire, timeout=30)
        free.release(2)  # closing may sync what is under way itself
        journal.close()

    asyncio.run(run())
    assert len(sizes) in (ROUNDS + 1, ROUNDS + 2)
    first, second, third, last = sizes[: ROUNDS + 1]
    assert second - first == third - second == last - third > CALLERS * 20
