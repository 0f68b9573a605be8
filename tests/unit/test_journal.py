"""How records of the journal are put on the disk together."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from threading import Semaphore

import pytest

from corral.gateway import journal as compiled
from corral.gateway.journal import NOBODY, Journal, Waiter
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


class Listener(Waiter):
    """Notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[bool] = []

    def recorded(self, written: bool) -> None:
        self.heard.append(written)


@pytest.mark.skipif(
    not (compiled.__file__ or "").endswith(".py"), reason="compiled, it takes no waiter of a test's own"
)
@pytest.mark.parametrize("fails", [False, True])
def test_who_waits_hears_nothing_before_the_disk_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    entered, free = Semaphore(0), Semaphore(0)

    def sync(descriptor: int) -> None:
        entered.release()
        assert free.acquire(timeout=30)
        if fails:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", sync)

    async def run() -> None:
        journal = Journal(tmp_path, "", asyncio.get_running_loop(), synced=True)
        first, second = Listener(), Listener()
        journal.record(Begun("g", 1.0), first)
        assert await asyncio.to_thread(entered.acquire, timeout=30)
        assert journal.spool.segment.stat().st_size > 0, "it is written, and no more than that"
        journal.record(Begun("g", 1.0), second)
        for _ in range(10):
            await asyncio.sleep(0)
        assert (first.heard, second.heard) == ([], [])
        free.release()
        # The next sync begins once the first one's waiters were told.
        assert await asyncio.to_thread(entered.acquire, timeout=30)
        assert (first.heard, second.heard) == ([not fails], [])
        monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)
        free.release()
        journal.close()
        assert len(second.heard) == 1

    asyncio.run(run())
