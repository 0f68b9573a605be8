"""Slots in a real Valkey and a real Redis: what gateways and the store tell each other after trouble."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.limits import flush
from support.servers import Server
from support.slots import gateways, granting, place, request_of, settled, usable

from corral.fleet.slots import PlaceState
from corral.fleet.tickets import HEAD, NEVER, PICKY
from corral.store import keeper
from corral.store.budget import ADMIT, EPOCH, GRANTS, PREFIX, RESERVE, Budget, sha
from corral.store.lua import combined
from corral.store.slots import Wanted
from corral.store.valkey import ValkeyDown, encode

RESIDENT = PlaceState.RESIDENT


def test_a_flushed_store_gives_nothing_until_all_have_told(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 3, lease=10.0) as made:
            await place(made[0], "n1", "a", "resident", 1, 2)
            for number, one in enumerate(made[:2]):
                assert (await one.ask(Wanted(f"r{number}", "a")))[0].node == "n1"
            _, waits = await made[2].ask(Wanted("waits", "a"))
            port = int(store.url.rpartition(":")[2].partition("/")[0])
            await flush(port)
            answer, early = await made[2].ask(Wanted("early", "a"))
            assert (answer.node, answer.away, answer.position) == ("", False, 1), "it waits until the store grants"
            await flush(port)  # and again, while some have told and others have not
            await place(made[0], "n1", "a", "resident", 2, 2)
            await granting(made[0])
            answer, _ = await made[2].ask(Wanted("late", "a"))
            assert not answer.node and answer.position >= 2, "both run, and who waited is ahead"
            made[0].slots.end("r0")
            assert (await asyncio.wait_for(waits, 8)).node == "n1"
            async with asyncio.timeout(8):
                while made[2].slots.early:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await settled(made, {"r1": "g2", "waits": "g3", "early": "g3", "late": "g3"})
            made[1].slots.end("r1")
            assert (await asyncio.wait_for(early, 8)).node == "n1"

    asyncio.run(work())


def test_what_was_given_while_nobody_heard_is_found_by_looking(store: Server) -> None:
    """The connection that hears is gone when the slot is given."""

    async def work() -> None:
        async with gateways(store.url, 2) as made:
            await place(made[0], "n1", "a", "resident", 1, 1)
            assert (await made[0].ask(Wanted("r0", "a")))[0].node == "n1"
            _, more = await made[1].ask(Wanted("r1", "a"))
            made[1].tasks[1].cancel()
            await asyncio.sleep(0)
            made[1].ears.lose()
            made[0].slots.end("r0")
            assert (await asyncio.wait_for(more, 10)).node == "n1"

    asyncio.run(work())


def test_what_a_gateway_gave_while_it_could_not_tell_is_counted_where_it_runs(store: Server) -> None:
    """A ticket of the store's had its turn elsewhere than the store would have sent it, and another gateway waits."""

    async def work() -> None:
        async with gateways(store.url, 2) as made:
            cut, other = made
            for node in ("n1", "n2"):
                await place(other, node, "a", "resident", 1, 1)
            for id in ("r1", "r2"):
                assert (await cut.ask(Wanted(id, "a")))[0].node
            ticket = Wanted("r3", "a")
            assert (await cut.ask(ticket))[0].position == 1
            answer, more = await other.ask(Wanted("r4", "a"))
            assert answer.position == 2
            cut.store.lose()
            for id in ("r1", "r2", "r3"):
                cut.slots.end(id)
            cut.slots.claim(ticket, "n2")
            assert (await asyncio.wait_for(more, 8)).node == "n1"
            await settled(made, {"r3": "g1", "r4": "g2"})
            assert await request_of(other, "g1", "r3") == [b"g", b"a", b"0", b"n2", b"1", b"0"]
            # The same of what the store runs late, of a connection that was given up: it is put right by a renewal.
            late = b"EVAL", SLOTS_OF_R3_ON_N1, b"0", PREFIX
            await other.store.request(*late)
            await keeper.renew(cut.slots)
            assert (await request_of(other, "g1", "r3"))[3] == b"n2"

    asyncio.run(work())


SLOTS_OF_R3_ON_N1 = b"""
local held, used = ARGV[1] .. 'held:g1', ARGV[1] .. 'used:a'
redis.call('HSET', held, 'r3', 'g a 0 n1 1 0')
redis.call('HINCRBY', used, 'n1', 1)
redis.call('HINCRBY', used, 'n2', -1)
"""


def test_who_has_waited_elsewhere_keeps_its_place_and_is_not_turned_away(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 1) as (one,):
            one.slots.length = b"1"
            await place(one, "n1", "a", "resident", 1, 1)
            assert (await one.ask(Wanted("r1", "a")))[0].node == "n1"
            assert (await one.ask(Wanted("r2", "a")))[0].position == 1
            assert (await one.ask(Wanted("r3", "a")))[0].full
            for position, word in enumerate((HEAD, HEAD, HEAD + "9000000"), 1):
                answer, _ = await one.ask(Wanted(f"r{3 + position}", "a", preferred=(word,)))
                assert answer.position == position, "before r2, in the order in which they came"

    asyncio.run(work())


def test_a_prompt_that_was_read_while_the_store_was_away_holds_up_no_other(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 2) as made:
            cut, other = made
            await place(other, "n1", "a", "resident", 1, 4)
            for number in range(2):  # beside others one long prompt at a time
                assert (await other.ask(Wanted(f"s{number}", "a")))[0].node == "n1"
            assert (await cut.ask(Wanted("r1", "a", 1)))[0].node == "n1"
            answer, more = await other.ask(Wanted("r2", "a", 1))
            assert answer.position == 1
            cut.store.lose()
            cut.slots.read("r1")
            assert (await asyncio.wait_for(more, 8)).node == "n1"

    asyncio.run(work())


def test_a_flushed_store_hears_what_a_ticket_avoids(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 1) as (one,):
            await place(one, "n1", "a", "resident", 1, 1)
            answer, more = await one.ask(Wanted("r1", "a", PICKY, preferred=(NEVER + "n1",)))
            assert answer.position == 1
            await flush(int(store.url.rpartition(":")[2].partition("/")[0]))
            await granting(one)
            await place(one, "n1", "a", "resident", 2, 1)
            await keeper.renew(one.slots)
            assert not more.done()
            await place(one, "n2", "a", "resident", 2, 1)
            assert (await asyncio.wait_for(more, 8)).node == "n2"

    asyncio.run(work())


def test_a_fault_in_taking_one_answer_is_not_the_end_of_others(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 1) as (one,):
            connections = one.store.connections

            def fails(reply: Any) -> None:
                raise ValueError(reply)

            one.store.call(encode(b"PING"), fails)
            assert await one.store.request(b"PING") == b"PONG"
            one.store.call(encode(b"PING"), fails)
            late = asyncio.create_task(one.store.request(b"PING"))
            await asyncio.sleep(0)
            assert one.store.connections == connections
            one.store.lose()
            with pytest.raises(ValkeyDown):
                await late

    asyncio.run(work())


def test_what_comes_free_while_a_store_is_told_is_nobodys_before_all_have(store: Server) -> None:
    """One gateway has told what it holds, another not yet: what it runs may be on the slot that comes free."""

    async def work() -> None:
        async with gateways(store.url, 2) as (one, other):
            await place(one, "n1", "a", "resident", 1, 2)
            assert (await one.ask(Wanted("s1", "a")))[0].node == "n1"
            assert (await other.ask(Wanted("o1", "a")))[0].node == "n1"
            turns = [(await one.ask(Wanted(f"t{number}", "a")))[1] for number in range(2)]
            for gateway in (one, other):
                gateway.tasks.pop().cancel()  # what tells the store
            await one.store.request(b"FLUSHALL")
            await keeper.renew(one.slots)
            await place(one, "n1", "a", "resident", 2, 2)
            one.slots.end("s1")
            await one.store.request(b"PING")
            assert await one.store.request(b"HGET", PREFIX + b"used:a", b"n1") == b"0"
            for gateway in (one, other):
                gateway.tasks.append(asyncio.create_task(keeper.keep(gateway.slots)))
            assert (await asyncio.wait_for(turns[0], 10)).node == "n1"
            assert not turns[1].done() and await one.store.request(b"HGET", PREFIX + b"used:a", b"n1") == b"2"

    asyncio.run(work())


def test_who_comes_back_first_gets_nothing_before_the_others_who_gave_slots_themselves(store: Server) -> None:
    """A store that hung has forgotten nothing, and knows nothing of what each gateway gave meanwhile."""

    async def work() -> None:
        async with gateways(store.url, 2) as (one, other):
            await place(one, "n1", "a", "resident", 1, 2)
            for gateway in (one, other):
                for task in gateway.tasks:
                    task.cancel()
                gateway.store.lose()
            one.slots.claim(Wanted("s1", "a"), "n1")
            one.slots.end("s1")
            for number in range(2):
                other.slots.claim(Wanted(f"o{number}", "a"), "n1")
            for gateway in (one, other):
                gateway.begin()
                async with asyncio.timeout(10):
                    while not gateway.store.connected:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                if gateway is one:
                    answer, turn = await one.ask(Wanted("t1", "a"))
                    assert not answer.node
            await granting(one)
            await usable([one, other])
            assert await one.store.request(b"HGET", PREFIX + b"used:a", b"n1") == b"2" and not turn.done()
            other.slots.end("o0")
            assert (await asyncio.wait_for(turn, 10)).node == "n1"

    asyncio.run(work())


def test_a_store_that_was_flushed_has_forgotten_its_leader_too(store: Server) -> None:
    """Nobody stands in for a leader before it had time to say that it is there."""

    async def work() -> None:
        async with gateways(store.url, 1) as (one,):
            for quiet, led, stands in ((30.0, True, False), (30.0, False, True), (0.0, True, True)):
                await one.store.request(b"DEL", PREFIX + b"places:a")
                one.slots.quiet, one.slots.was_led = quiet, led
                one.slots.stand("a", [("n1", 1)])
                await one.store.request(b"PING")
                assert bool(await one.store.request(b"HGETALL", PREFIX + b"places:a")) == stands

    asyncio.run(work())


@pytest.mark.parametrize("limits", [ADMIT, RESERVE])
def test_limits_and_slot_are_one_call(store: Server, limits: str) -> None:
    """What the limits refuse takes no slot; what they admit gets one, or a ticket, in the same answer."""
    whole = combined(limits)
    key = Budget("k", rpm=600, concurrency=2, tpm=None if limits is ADMIT else 10_000)

    async def work() -> None:
        async with gateways(store.url, 1) as (one,):
            request = one.store.request
            await place(one, "n1", "a", "resident", 1, 1)
            await request(b"SCRIPT", b"LOAD", whole.encode())
            words = key.prefix.split(b"\r\n")[2::2]  # the command that asks the limits alone, up to the request's id
            keys = int(words[2])

            async def ask(id: bytes) -> Any:
                slot = (b"g1", id, b"a", b"0", b"-", b"1000000", b"1", b"0", b"256", b"n1")
                rest = (*words[3 + keys :], id, *([] if limits is ADMIT else [b"100"]))
                names = words[3 : 3 + keys]
                return await request(b"EVALSHA", sha(whole), words[2], *names, b"%d" % len(slot), *slot, *rest)

            assert await ask(b"r1") == 0, "the limits do not grant yet"
            await request(b"SET", GRANTS, b"1")
            await request(b"SET", EPOCH, b"1")
            verdict, slot = await ask(b"r1")
            assert verdict[0] == 1 and slot == [1, b"n1", 1]
            verdict, slot = await ask(b"r1")
            assert verdict[0] == 1 and slot == [1, b"n1", 1], "a repeated call counts once"
            verdict, slot = await ask(b"r2")
            assert verdict[0] == 1 and slot[:3] == [2, 1, 1]
            (verdict,) = await ask(b"r3")
            assert verdict[0] == 0, "two at once"
            assert await request(b"HKEYS", PREFIX + b"held:g1") == [b"r1", b"r2"]

    asyncio.run(work())
