"""Two releases share a store: neither changes what the other keeps, by its schema's version, nor takes it for its own.

Flushing, which knows no versions, is left out.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from support import limits as limiting
from support.servers import Server
from support.slots import Gateway, gateways, place

from corral.store import leases
from corral.store.budget import Budget
from corral.store.lua import PREFIX
from corral.store.slots import Wanted
from corral.store.suspects import Suspects
from corral.store.valkey import Valkey

NEXT = b"corral:%d:" % (int(PREFIX.split(b":")[1]) + 1)


async def kept(store: Valkey, prefix: bytes) -> dict[bytes, Any]:
    """What stands under a prefix: each value, and when it ends (-1: never)."""
    keys = await store.request(b"KEYS", prefix + b"*")
    return {key: (await store.request(b"DUMP", key), await store.request(b"PTTL", key)) for key in keys}


async def works(url: str, first: Gateway, second: Gateway, generation: int) -> None:
    """What gateways and a leader have a store do: places, slots, tickets, limits, prompts that crash."""
    request = first.store.request
    assert await place(first, "n1", "a", "resident", generation, 2)
    assert await place(first, "n2", "a", "draining", generation, 2)
    running = [(await one.ask(Wanted(f"r{at}", "a")))[0].node for at, one in enumerate((first, second))]
    assert running == ["n1", "n1"]
    answer, turn = await second.ask(Wanted("r2", "a", kind=1))
    assert answer.position == 1
    first.slots.end("r0")
    async with asyncio.timeout(30):
        assert (await turn).node == "n1"
    second.slots.read("r2")
    first.slots.claim(Wanted("r3", "a"), "n2")
    first.slots.stand("b", [("n1", 2)])
    for one, id in ((second, "r1"), (second, "r2"), (first, "r3")):
        one.slots.end(id)
    await second.store.request(b"PING")

    limited = limiting.Gateway(url, f"g{generation}")
    tasks = [asyncio.create_task(work) for work in (limited.store.run(), leases.keep(limited.limits))]
    try:
        async with asyncio.timeout(30):
            while not limited.store.connected or not limited.limits.sharing.read:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        tenant = Budget("tenant", rpm=100, concurrency=9)
        budget = limited.budget("key", tenant, rpm=100, tpm=10_000, concurrency=9, daily_tokens=10**6)
        for id in ("l1", "l2"):
            assert not (await limited.ask(budget, id, 10)).refused
        await limited.settle(budget, "l1", 7)
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    suspects = Suspects(first.store)
    suspects.crashed("prompt", "a", "n1", 1.0, False, lambda refused, crashes: None)
    suspects.crashed("other", "a", "n1", 1.0, False, lambda refused, crashes: None)
    suspects.clear("other")
    await request(b"PING")


def test_what_another_version_keeps_is_left_alone(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 2) as (first, second):
            request = first.store.request
            await works(store.url, first, second, 1)
            mine = await kept(first.store, PREFIX)
            assert len(mine) > 15 and len(mine) == await request(b"DBSIZE"), "all under the version's prefix"
            # The other release has kept just the same: whatever names a key wrongly finds one there.
            for key in mine:
                await request(b"COPY", key, NEXT + key.removeprefix(PREFIX))
                await request(b"PERSIST", NEXT + key.removeprefix(PREFIX))
            theirs = await kept(first.store, NEXT)
            assert len(theirs) > 15
            third = Gateway(store.url, "g3", 10.0, 5.0, 2)
            try:
                async with asyncio.timeout(30):
                    while not third.slots.usable:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                await works(store.url, third, second, 2)
                assert await kept(first.store, NEXT) == theirs
                # Nor does it count here what runs there, or wait behind it.
                await request(b"HSET", NEXT + b"used:a", b"n1", b"2")
                assert (await third.ask(Wanted("last", "a")))[0].node == "n1"
            finally:
                await third.kill()

    asyncio.run(work())
