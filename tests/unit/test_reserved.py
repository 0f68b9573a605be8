"""Control tells the store what requests used whose gateway was killed: the guess that was reserved counts no longer."""

from __future__ import annotations

import asyncio
from typing import Any

from support.limits import Gateway, run, unused
from support.servers import Server

from corral.control.reserved import Reserved
from corral.store.budget import LIMITS, Budget


def row(key: str | None, request: str, prompt: int | None, tokens: int | None) -> dict[str, Any]:
    return {"key": key, "id": request, "prompt_tokens": prompt, "tokens": tokens}


def test_what_the_record_says_takes_the_place_of_the_guess(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        killed, other = made
        name, tenant = unused(), unused()
        limits = {"daily_tokens": 1000, "concurrency": 4}
        mine, theirs = (
            one.budget(name, Budget("t:" + tenant, monthly_tokens=5000), **limits)  # type: ignore[arg-type]
            for one in made
        )
        for request in ("a", "b", "c"):
            assert (await killed.ask(mine, request, 300)).refused == ""
        await killed.settle(mine, "c", 30)

        killed.limits.busy.clear()  # it is gone: nobody renews its leases

        def limited(key: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
            if key != name:
                return None, None
            none = dict.fromkeys(LIMITS)
            return {**none, "id": name, "daily_tokens": 1000}, {**none, "name": tenant, "monthly_tokens": 5000}

        reserved = Reserved(other.store, limited, {"concurrency": 4})
        # One is settled, of one the store knows nothing, one has no key, one's key is not known.
        reserved.ended(
            [row(name, "c", 200, 90), row(name, "other", 7, 7), row(None, "x", 1, 1), row("gone", "y", 1, 1)]
        )
        reserved.ended([row(name, "a", 10, 5), row(name, "b", None, None)])
        other.store.connected = False
        await reserved.tell()
        other.store.connected = True
        assert (await other.ask(theirs, "list")).tokens_remaining == 1000 - 630, "it was not told while it was away"
        for _ in range(2):
            await reserved.tell()
            assert (await other.ask(theirs, unused())).tokens_remaining == 1000 - 45
        assert (theirs.day_used, theirs.tenant and theirs.tenant.month_used) == (45, 45)
        assert await other.store.request(b"ZCARD", theirs.leases) == 3, (
            "of the three that asked, none of the killed one's"
        )

    run(store, 2, work)


def test_a_store_that_lost_what_it_knew_is_told_later(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        key = gateway.budget(unused(), daily_tokens=1000)
        assert (await gateway.ask(key, "a", 300)).refused == ""
        reserved = Reserved(
            gateway.store, lambda name: (dict.fromkeys(LIMITS) | {"id": name}, None), {"daily_tokens": 1000}
        )
        reserved.ended([row(key.key_id, "a", 10, 5)])
        epoch = await gateway.store.request(b"GET", b"corral:1:epoch")
        await asyncio.gather(gateway.store.request(b"DEL", b"corral:1:epoch"), reserved.tell())
        await gateway.store.request(b"SET", b"corral:1:epoch", epoch)
        assert (await gateway.ask(key, "b")).tokens_remaining == 700
        await reserved.tell()
        assert (await gateway.ask(key, "c")).tokens_remaining == 985

    run(store, 1, work)
