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
from corral.gateway.records import Admitted, Begun, Settled
from corral.store.spool import decode_frames

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


@pytest.mark.skipif(
    not (compiled.__file__ or "").endswith(".py"), reason="compiled, it takes no waiter of a test's own"
)
@pytest.mark.parametrize("fails", [False, True])
def test_who_waits_at_the_end_hears_nothing_before_the_disk_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    steps: list[object] = []

    def sync(descriptor: int) -> None:
        steps.append(os.fstat(descriptor).st_size)
        if fails:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", sync)

    class Told(Waiter):
        def recorded(self, written: bool) -> None:
            steps.append(written)

    async def run() -> None:
        faults: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(context))
        journal = Journal(tmp_path, "", asyncio.get_running_loop(), synced=True)
        journal.record(Begun("g", 1.0), Told())
        segment = journal.spool.segment
        journal.close()
        assert steps == [segment.stat().st_size, not fails]
        await asyncio.sleep(0)
        assert not faults, "what was to commit that group finds nothing to do"

    asyncio.run(run())


class Refused(Waiter):
    """Ends its request where it hears that its admission is not on the disk, as an exchange does."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.appended = False
        self.heard: list[bool] = []

    def recorded(self, written: bool) -> None:
        self.heard.append(written)
        if len(self.heard) == 1 and not written:
            times = 503, "overloaded", "", 0, 1, 1, 0, 0, False, 0.0, None, 1.0
            settled = Settled("r", "r", 1.0, "g", "k", "a", "native", "/api/chat", "POST", "m", *times)
            self._journal.record(settled, self, follows=self.appended)


@pytest.mark.skipif(
    not (compiled.__file__ or "").endswith(".py"), reason="compiled, it takes no waiter of a test's own"
)
def test_a_request_whose_admission_the_disk_refused_is_not_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the disk refused stands in the segment all the same, and control gets it."""
    refused = []

    def sync(descriptor: int) -> None:
        if not refused:
            refused.append(descriptor)
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", sync)

    async def run() -> None:
        journal = Journal(tmp_path, "", asyncio.get_running_loop(), synced=True)
        waiter = Refused(journal)
        admitted = Admitted("r", "r", 1.0, "g", "k", "a", "native", "/api/chat", "m", None)
        waiter.appended = journal.record(admitted, waiter)
        async with asyncio.timeout(30):
            while len(waiter.heard) < 2:  # noqa: ASYNC110 (what it waits for has no event)
                await asyncio.sleep(0.01)
        assert waiter.heard == [False, True]
        segment = journal.spool.segment
        journal.close()
        assert [record["t"] for _, record in decode_frames(segment.read_bytes())] == ["admit", "settle"]

    asyncio.run(run())
