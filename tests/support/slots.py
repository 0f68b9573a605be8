"""Gateways' slots over a real store, without the gateways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from corral.store import slots
from corral.store.slots import Answer, Slots, Wanted
from corral.store.valkey import Valkey, ValkeyDown
from support.limits import flush


class Gateway:
    """One that asks, and hears; ``lease`` in seconds. `kill` ends it as a signal would: it says nothing more."""

    def __init__(self, url: str, name: str, lease: float, patience: float, count: int) -> None:
        self.name = name
        self.store = Valkey(url, scripts=slots.SCRIPTS, timeout=patience)
        self.slots = Slots(self.store, Valkey(url, timeout=patience), name, lease)
        self.slots.gateways = lambda: count
        self.tasks = [asyncio.create_task(work) for work in (self.store.run(), self.slots.listen(), self.slots.keep())]

    async def ask(self, wanted: Wanted) -> tuple[Answer, asyncio.Future[Answer]]:
        """The first answer, and what will be the second one of a ticket."""
        answers: list[asyncio.Future[Answer]] = [asyncio.get_running_loop().create_future() for _ in range(2)]

        def heard(answer: Answer) -> None:
            future = answers[0] if not answers[0].done() else answers[1]
            if not future.cancelled():
                future.set_result(answer)

        self.slots.ask(wanted, heard)
        return await answers[0], answers[1]

    async def kill(self) -> None:
        """End all that it does."""
        for task in self.tasks:
            task.cancel()
        for task in self.tasks:
            with suppress(asyncio.CancelledError):
                await task


@asynccontextmanager
async def gateways(url: str, count: int, lease: float = 10.0, patience: float = 5.0) -> AsyncIterator[list[Gateway]]:
    """So many gateways, connected to a store that is empty but grants."""
    await flush(int(url.rpartition(":")[2].partition("/")[0]))
    made = [Gateway(url, f"g{number}", lease, patience, count) for number in range(1, count + 1)]
    try:
        await granting(made[0])
        yield made
    finally:
        for one in made:
            await one.kill()


async def granting(gateway: Gateway, seconds: float = 30.0) -> None:
    """Wait until the store grants."""
    async with asyncio.timeout(seconds):
        while True:
            with suppress(ValkeyDown):
                if gateway.store.connected and await gateway.store.request(b"EXISTS", slots.GRANTS):
                    return
            await asyncio.sleep(0.02)
