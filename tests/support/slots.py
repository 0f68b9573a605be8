"""Gateways' slots over a real store, without the gateways."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from corral.fleet.slots import step_of
from corral.store import keeper
from corral.store.lua import PREFIX
from corral.store.slots import GRANTS, MOST, Answer, Slots, Wanted
from corral.store.valkey import Valkey, ValkeyDown
from support.limits import flush


class Gateway:
    """One that asks, and hears; ``lease`` in seconds. `kill` ends it as a signal would: it says nothing more."""

    def __init__(self, url: str, name: str, lease: float, patience: float, count: int, length: int = MOST) -> None:
        self.name = name
        self.store = Valkey(url, scripts=keeper.SCRIPTS, timeout=patience)
        self.ears = Valkey(url, timeout=patience)
        self.slots = Slots(self.store, name, length, lease)
        self.store.on_connect = self.slots.connected
        self.slots.gateways, self.slots.quiet = lambda: count, 0.0
        self.begin()

    def begin(self) -> None:
        """Connect, and tell and hear what a gateway does (again)."""
        works = (self.store.run(), keeper.listen(self.slots, self.ears), keeper.keep(self.slots))
        self.tasks = [asyncio.create_task(work) for work in works]

    async def ask(self, wanted: Wanted) -> tuple[Answer, asyncio.Future[Answer]]:
        """The first answer, and what will be the second one of a ticket."""
        answers: list[asyncio.Future[Answer]] = [asyncio.get_running_loop().create_future() for _ in range(2)]

        def heard(answer: Answer) -> None:
            future = answers[0] if not answers[0].done() else answers[1]
            if future is answers[1] and not answer.node and not answer.away:
                return  # its position again
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
async def gateways(
    url: str, count: int, lease: float = 10.0, patience: float = 5.0, length: int = MOST
) -> AsyncIterator[list[Gateway]]:
    """So many gateways, connected to a store that is empty but grants."""
    await flush(int(url.rpartition(":")[2].partition("/")[0]))
    made = [Gateway(url, f"g{number}", lease, patience, count, length) for number in range(1, count + 1)]
    try:
        await granting(made[0])
        await usable(made)
        yield made
    finally:
        for one in made:
            await one.kill()


async def granting(gateway: Gateway, seconds: float = 60.0) -> None:
    """Wait until the store grants."""
    async with asyncio.timeout(seconds):
        while True:
            with suppress(ValkeyDown):
                if gateway.store.connected and await gateway.store.request(b"EXISTS", GRANTS):
                    return
            await asyncio.sleep(0.02)


async def usable(made: list[Gateway], seconds: float = 60.0) -> None:
    """Wait until each of them may ask for slots."""
    async with asyncio.timeout(seconds):
        while not all(one.slots.usable for one in made):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def place(gateway: Gateway, node: str, model: str, state: str, generation: int, slots: int) -> bool:
    """Say where a model stands."""
    return await keeper.place(gateway.store, node, model, state, generation, slots, step_of(slots, 0, 0))


async def settled(made: list[Gateway], ids: dict[str, str]) -> None:
    """What the store counts is what is held, neither more nor less."""
    request = made[-1].store.request  # the first may be dead
    used: Counter[tuple[bytes, bytes]] = Counter()
    found = {}
    for one in made:
        held = await request(b"HGETALL", PREFIX + b"held:" + one.name.encode())
        for id, text in zip(held[::2], held[1::2], strict=True):
            found[id.decode()] = one.name
            words = text.split(b" ")
            if words[0] == b"g":
                used[words[1], words[3]] += 1
    assert found == ids
    for model in (b"a", b"b"):
        counts = await request(b"HGETALL", PREFIX + b"used:" + model)
        for node, count in zip(counts[::2], counts[1::2], strict=True):
            assert int(count) == used[model, node]


async def request_of(gateway: Gateway, of: str, id: str) -> list[bytes]:
    """What the store has of a request; nothing where it knows of none."""
    text: bytes | None = await gateway.store.request(b"HGET", PREFIX + b"held:" + of.encode(), id.encode())
    return text.split(b" ") if text else []
