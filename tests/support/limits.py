"""Gateways' limits over a real store, without the gateways: each has its connection, and what keeps it current."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from time import monotonic

from hypothesis import HealthCheck, settings

from corral.store import leases, share
from corral.store.budget import GRANTS, Budget
from corral.store.limits import Limits, Verdict
from corral.store.valkey import Valkey, ValkeyDown, encode
from support.servers import Server

PROPERTY = settings(max_examples=25, suppress_health_check=list(HealthCheck), database=None, print_blob=True)
"""Other examples in each run; one that fails is printed with what makes it again (`@reproduce_failure`)."""

_numbers = itertools.count()


def unused() -> str:
    """A key that nobody has used."""
    return f"k{next(_numbers)}"


class Gateway:
    """Limits, and the budgets of keys by name."""

    def __init__(self, url: str, name: str, denied: tuple[str, ...] = (), timeout: float = 5.0) -> None:
        # A property test may load this machine; what the time-out does is tested in tests/faults.
        self.store = Valkey(url, scripts=leases.SCRIPTS, timeout=timeout)
        self.ears = Valkey(url)
        self.ears.on_message = self._told
        self.ears.on_connect = lambda: self.ears.call(encode(b"SUBSCRIBE", share.CHANNEL), lambda _: None)
        self.limits = Limits(self.store, name, denied)
        self.budgets: dict[str, Budget] = {}
        self.limits.budgets, self.limits.find = self.budgets.values, self.budgets.get

    def budget(self, name: str, tenant: Budget | None = None, **limits: int) -> Budget:
        """A key with limits."""
        self.budgets[name] = budget = Budget(name, tenant=tenant, **limits)  # type: ignore[arg-type]
        if tenant is not None:
            self.budgets[tenant.key_id] = tenant
        return budget

    def _told(self, message: list[bytes]) -> None:
        share.told(self.limits.sharing, self.limits.find, message[2], monotonic())

    async def ask(self, budget: Budget, request_id: str, tokens: int = 0) -> Verdict:
        """Admit a request."""
        heard: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self.limits.admit(budget, request_id, monotonic(), heard.set_result, tokens)
        return await heard

    async def settle(self, budget: Budget, request_id: str, used: int = 0) -> None:
        """End it, and wait until the store has heard of that."""
        self.limits.release(budget, request_id, used)
        if self.store.connected:
            await asyncio.sleep(0)
            await self.store.request(b"PING")


async def flush(port: int) -> None:
    """Have a store forget everything."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(encode(b"FLUSHALL"))
    assert await reader.readline() == b"+OK\r\n"
    writer.close()


@asynccontextmanager
async def gateways(
    url: str, count: int, denied: tuple[str, ...] = (), patience: float = 5.0
) -> AsyncIterator[list[Gateway]]:
    """So many gateways, connected to a store that is empty but grants."""
    await flush(int(url.rpartition(":")[2].partition("/")[0]))
    made = [Gateway(url, f"gateway-{number}", denied, patience) for number in range(1, count + 1)]
    works = (work for one in made for work in (one.store.run(), one.ears.run(), leases.keep(one.limits)))
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await granting(made)
        yield made
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


async def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (what it waits for has no event)
            await asyncio.sleep(0.02)


async def granting(made: list[Gateway], seconds: float = 60.0) -> None:
    """Wait until the store grants, and every gateway is counted."""
    async with asyncio.timeout(seconds):
        while True:
            known = [one.limits.sharing for one in made if one.store.connected]
            present = len(known) == len(made) == sum(one.read and one.count >= len(made) for one in known)
            present = present and all(one.ears.connected for one in made)
            with suppress(ValkeyDown):
                if present and await made[0].store.request(b"EXISTS", GRANTS):
                    return
            await asyncio.sleep(0.02)


def run(store: Server, count: int, work: Callable[[list[Gateway]], Awaitable[None]]) -> None:
    """Have so many gateways do something."""

    async def all_of_it() -> None:
        async with gateways(store.url, count) as made:
            await work(made)

    asyncio.run(all_of_it())
