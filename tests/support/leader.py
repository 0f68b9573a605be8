"""A leader that says what a test wants: which model stands where, in a real store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from corral.fleet.slots import step_of
from corral.store import keeper
from corral.store.lua import PREFIX
from corral.store.valkey import Valkey

_COUNTS = b"""
local used, held = 0, 0
for _, count in ipairs(redis.call('HVALS', ARGV[1] .. 'used:' .. ARGV[2])) do used = used + tonumber(count) end
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. 'held:*')) do
  for _, text in ipairs(redis.call('HVALS', key)) do
    if string.sub(text, 1, #ARGV[2] + 3) == 'g ' .. ARGV[2] .. ' ' then held = held + 1 end
  end
end
return { used, held }
"""


class Leader:
    """Leads, until told otherwise: the store has its word for good. Each call is a connection of its own."""

    def __init__(self, url: str, term: int = 1) -> None:
        self.url, self.term, self._generation = url, term, 0

    def leads(self) -> None:
        """Have gateways believe in a leader from now on."""
        self.ask(b"SET", keeper.LEADER, b"%d" % self.term)

    def leaves(self) -> None:
        """Be gone."""
        self.ask(b"DEL", keeper.LEADER)

    def place(self, node: str, model: str, slots: int = 1, state: str = "resident") -> None:
        """Say where a model stands."""
        self._generation += 1
        number = (self.term << 24) + self._generation

        async def work(store: Valkey) -> Any:
            return await keeper.place(store, node, model, state, number, slots, step_of(slots, 0, 0))

        assert asyncio.run(self._with(work))

    def ask(self, *parts: bytes) -> Any:
        """A command to the store."""

        async def work(store: Valkey) -> Any:
            return await store.request(*parts)

        return asyncio.run(self._with(work))

    def used(self, model: str = "m:latest") -> dict[str, int]:
        """Slots in use by node, as the store counts."""
        flat = self.ask(b"HGETALL", PREFIX + b"used:" + model.encode())
        return {name.decode(): int(count) for name, count in zip(flat[::2], flat[1::2], strict=True) if int(count)}

    def waiting(self, model: str = "m:latest") -> int:
        """Tickets of a model."""
        return sum(self.ask(b"ZCARD", PREFIX + b"wait:%b:%d" % (model.encode(), kind)) for kind in range(6))

    def counts(self, model: str = "m:latest") -> tuple[int, int]:
        """Slots in use of a model, and requests that hold one, of all gateways: at the same moment."""
        found = self.ask(b"EVAL", _COUNTS, b"0", PREFIX, model.encode())
        return int(found[0]), int(found[1])

    async def _with(self, work: Callable[[Valkey], Awaitable[Any]]) -> Any:
        store = Valkey(self.url, scripts=keeper.SCRIPTS, timeout=5.0)
        running = asyncio.create_task(store.run())
        try:
            async with asyncio.timeout(60):
                while not store.connected:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            return await work(store)
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
