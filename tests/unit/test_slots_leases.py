"""Leases of slots in a real Valkey and a real Redis: gateways that die, stand still, or lose the store as one ends."""

from __future__ import annotations

import asyncio

import pytest
from support.process import heeded
from support.servers import Server
from support.slots import gateways, place, request_of, settled, usable

from corral.store import keeper
from corral.store.lua import PREFIX
from corral.store.slots import ANEW, Answer, Wanted


def test_a_gateway_that_was_thought_dead_tells_of_what_runs(store: Server) -> None:
    """Its slots were given to others meanwhile: they are counted again, and nothing more is given until they end."""

    async def work() -> None:
        async with gateways(store.url, 2, lease=2.0) as made:
            stalled, other = made
            await place(other, "n1", "a", "resident", 1, 1)
            assert (await stalled.ask(Wanted("s1", "a")))[0].node == "n1"
            keeping = stalled.tasks.pop()
            keeping.cancel()  # as if it stood still
            _, more = await other.ask(Wanted("o1", "a"))
            assert (await asyncio.wait_for(more, 10)).node == "n1"
            stalled.tasks.append(asyncio.create_task(keeper.keep(stalled.slots)))
            async with asyncio.timeout(30):
                while int(await other.store.request(b"HGET", PREFIX + b"used:a", b"n1")) != 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            answer, more = await other.ask(Wanted("o2", "a"))
            assert answer.position == 1
            other.slots.end("o1")
            await other.store.request(b"PING")
            assert not more.done(), "s1 still runs there"
            stalled.slots.end("s1")
            assert (await asyncio.wait_for(more, 30)).node == "n1"

    asyncio.run(work())


@pytest.mark.parametrize("what", ["a turn", "an answer"])
def test_what_was_given_before_the_lease_was_over_is_not_taken_after_it(store: Server, what: str) -> None:
    """A gateway stands still, its connections with it, and goes on: the slot is another's by then."""

    async def work() -> None:
        async with gateways(store.url, 2, lease=2.0) as made:
            stalled, other = made
            await place(other, "n1", "a", "resident", 1, 1)
            heard: asyncio.Future[tuple[Answer, asyncio.Future[Answer]]] | None = None
            if what == "a turn":
                assert (await other.ask(Wanted("o1", "a")))[0].node == "n1"
                assert (await stalled.ask(Wanted("s1", "a")))[0].position == 1
            keeping = stalled.tasks.pop()
            keeping.cancel()
            connections = [one.transport for one in (stalled.store, stalled.ears) if one.transport is not None]
            for transport in connections:
                transport.pause_reading()
            if what == "a turn":
                other.slots.end("o1")
            else:
                heard = asyncio.ensure_future(stalled.ask(Wanted("s1", "a")))
            async with asyncio.timeout(30):
                # It is given to the one that does not hear.
                while (await request_of(other, stalled.name, "s1"))[:1] != [b"g"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            answer, more = await other.ask(Wanted("o2", "a"))
            assert (answer.node or (await asyncio.wait_for(more, 10)).node) == "n1"
            for transport in connections:
                transport.resume_reading()
            if heard is not None:
                assert not (await asyncio.wait_for(heard, 30))[0].node
            stalled.tasks.append(asyncio.create_task(keeper.keep(stalled.slots)))
            async with asyncio.timeout(30):
                while (await request_of(other, stalled.name, "s1"))[:1] != [b"t"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert not stalled.slots.held["s1"].node, "o2 has the slot"
            other.slots.end("o2")
            async with asyncio.timeout(30):
                while stalled.slots.held["s1"].node != "n1":  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await settled(made, {"s1": stalled.name})

    asyncio.run(work())


def test_a_turn_that_comes_without_a_connection_does_not_stop_the_gateway(store: Server) -> None:
    """Its ears may hear of one while the store's other connection is away, and its lease over."""

    async def work() -> None:
        async with gateways(store.url, 1) as (one,):
            await place(one, "n1", "a", "resident", 1, 1)
            one.store.lose()
            one.slots.until = 0.0
            one.slots.given("r1", "n1", 1)
            async with asyncio.timeout(10):
                while not one.slots.counts:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert (await one.ask(Wanted("r1", "a")))[0].node == "n1"

    with heeded(30):
        asyncio.run(work())


def test_the_slots_of_one_that_died_are_given_as_soon_as_its_lease_is_over(store: Server) -> None:
    """Not only by the next renewal: it would come after minutes here."""

    async def work() -> None:
        async with gateways(store.url, 2, lease=1000.0) as (dead, other):
            await place(other, "n1", "a", "resident", 1, 1)
            assert (await dead.ask(Wanted("d1", "a")))[0].node == "n1"
            answer, more = await other.ask(Wanted("o1", "a"))
            assert answer.position == 1
            await dead.kill()
            await other.store.request(b"ZADD", PREFIX + b"live", b"1", dead.name.encode())
            assert (await asyncio.wait_for(more, 10)).node == "n1"
            await settled([other], {"o1": other.name})

    with heeded(30):
        asyncio.run(work())


def test_one_that_stood_still_waits_for_the_store_before_it_gives_a_share_of_its_own(store: Server) -> None:
    """Its lease is over, and others have what it had: all of that runs beside what it gives."""

    async def work() -> None:
        async with gateways(store.url, 1) as (one,):
            await place(one, "n1", "a", "resident", 1, 2)
            one.slots.until = 0.0
            one.store.lose()
            answer, more = await one.ask(Wanted("r1", "a"))
            assert (answer.away, answer.position) == (False, 1)
            assert (await asyncio.wait_for(more, 10)).node == "n1"
            one.slots.until = 0.0
            one.store.lose()
            one.store.lost -= ANEW + 0.1
            assert (await one.ask(Wanted("r2", "a")))[0].away, "the store is away, for others too"
            await usable([one])
            one.store.lose()
            assert (await one.ask(Wanted("r3", "a")))[0].away, "the lease holds: its share is its own"

    with heeded(30):
        asyncio.run(work())


def test_an_answer_that_is_lost_after_the_lease_is_asked_for_anew(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 1) as (one,):
            await place(one, "n1", "a", "resident", 1, 1)
            asked = asyncio.ensure_future(one.ask(Wanted("r1", "a")))
            await asyncio.sleep(0)  # it is on its way
            one.slots.until = 0.0
            one.store.lose()
            answer, more = await asked
            assert (answer.away, answer.position) == (False, 1)
            assert (await asyncio.wait_for(more, 10)).node == "n1"

    with heeded(30):
        asyncio.run(work())
