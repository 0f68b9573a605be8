"""Slots in a real Valkey where two things happen at once: none is lost, none is given twice."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

from support.limits import flush
from support.servers import Server
from support.slots import Gateway, gateways, granting, place, settled

from corral.fleet.tickets import HEAD, LATE, NEVER, PICKY
from corral.store import keeper
from corral.store.lua import PREFIX
from corral.store.slots import Answer, Wanted
from corral.store.valkey import ValkeyDown


async def settles(made: list[Gateway], ids: dict[str, str], seconds: float = 10.0) -> None:
    """Wait until the store counts what is held, neither more nor less."""
    async with asyncio.timeout(seconds):
        while True:
            with suppress(AssertionError, ValkeyDown):
                await settled(made, ids)
                return
            await asyncio.sleep(0.05)


def test_who_leaves_at_the_moment_of_its_grant_leaves_the_slot_to_the_next(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 3) as made:
            holds, leaves, waits = made
            await place(holds, "n1", "a", "resident", 1, 1)
            for turn in range(20):
                assert (await holds.ask(Wanted(f"h{turn}", "a")))[0].node == "n1"
                assert (await leaves.ask(Wanted(f"l{turn}", "a")))[0].position == 1
                _, late = await waits.ask(Wanted(f"w{turn}", "a"))
                holds.slots.end(f"h{turn}")
                if turn % 2:  # the store has given it by then, and the gateway may not have heard
                    await holds.store.request(b"PING")
                leaves.slots.end(f"l{turn}")
                assert (await asyncio.wait_for(late, 8)).node == "n1"
                waits.slots.end(f"w{turn}")
                await waits.store.request(b"PING")
            await settled(made, {})

    asyncio.run(work())


def test_a_gateway_that_dies_between_grant_and_word_keeps_the_slot_for_its_lease_only(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 3, lease=1.0) as made:
            holds, dies, waits = made
            await place(holds, "n1", "a", "resident", 1, 1)
            assert (await holds.ask(Wanted("h", "a")))[0].node == "n1"
            assert (await dies.ask(Wanted("d", "a")))[0].position == 1
            _, late = await waits.ask(Wanted("w", "a"))
            dies.ears.on_message = lambda message: None  # it is given a slot, and is dead before it hears
            holds.slots.end("h")
            await holds.store.request(b"PING")
            await dies.kill()
            assert (await asyncio.wait_for(late, 8)).node == "n1"
            await settled(made[::2], {"w": "g3"})

    asyncio.run(work())


def test_a_flush_between_grant_and_release_takes_nothing_below_nothing(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 2) as made:
            one, other = made
            await place(one, "n1", "a", "resident", 1, 1)
            assert (await one.ask(Wanted("r1", "a")))[0].node == "n1"
            await flush(int(store.url.rpartition(":")[2].partition("/")[0]))
            one.slots.end("r1")
            await granting(one)
            await place(one, "n1", "a", "resident", 2, 1)
            answers = [await gateway.ask(Wanted(f"n{at}", "a")) for at, gateway in enumerate((one, other))]
            async with asyncio.timeout(8):
                while sum(bool(a.node) or late.done() for a, late in answers) < 1:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await other.store.request(b"PING")
            assert sum(bool(a.node) or late.done() for a, late in answers) == 1, "one slot, given once"
            await settles(made, {"n0": "g1", "n1": "g2"})

    asyncio.run(work())


def test_a_call_that_timed_out_and_was_run_all_the_same_costs_no_slot(store: Server) -> None:
    """The store has given a slot, and a ticket, to a gateway that does not know: both are free with its next word."""

    async def work() -> None:
        async with gateways(store.url, 2) as made:
            cut, other = made
            await place(other, "n1", "a", "resident", 1, 1)
            heard: list[Answer] = []
            for id in ("lost", "lost-ticket"):
                cut.slots.ask(Wanted(id, "a"), heard.append)
            cut.store._flush()  # what was asked has left
            cut.store.lose()
            assert [answer.away for answer in heard] == [True, True]
            async with asyncio.timeout(8):
                while not await other.store.request(b"HEXISTS", PREFIX + b"held:g1", b"lost"):
                    if cut.slots.counts:
                        break  # it has been put right already
            answer, late = await other.ask(Wanted("r", "a"))
            assert answer.node == "n1" or (await asyncio.wait_for(late, 8)).node == "n1"
            await settles(made, {"r": "g2"}, 3)

    asyncio.run(work())


def test_renewals_that_race_with_the_end_of_a_lease_leave_what_runs_counted_once(store: Server) -> None:
    """One gateway is late again and again while the others take back what it held: what it says last is what counts."""

    async def work() -> None:
        draw = random.Random(1)
        async with gateways(store.url, 3) as made:
            for one in made:
                one.tasks.pop().cancel()  # it is this test that renews
            late = made[0]
            await place(late, "n1", "a", "resident", 1, 4)
            for number in range(3):
                assert (await late.ask(Wanted(f"r{number}", "a")))[0].node == "n1"
            for one in made:
                one.slots.lease = 0.2  # s, from now on: of what is asked for none is to be over
            for _ in range(30):
                await asyncio.sleep(draw.uniform(0.15, 0.25))
                some = [made[0], made[1], made[2]]
                draw.shuffle(some)
                await asyncio.gather(*(keeper.renew(one.slots) for one in some))
                await settled(made, {f"r{number}": "g1" for number in range(3)})

    asyncio.run(work())


def test_without_a_leader_gateways_say_where_a_model_may_be_used_and_share_its_slots(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 2) as made:
            one, other = made
            assert (await one.ask(Wanted("r0", "a")))[0].slots == 0
            for gateway in made:
                gateway.slots.stand("a", [("n1", 1), ("n2", 2)])
            lates = [await gateway.ask(Wanted(f"r{at}", "a")) for at, gateway in enumerate(made * 2, 1)]
            nodes = sorted(answer.node for answer, _ in lates)
            assert nodes == ["", "", "n1", "n2"] or nodes.count("") == 2, "three slots, one of which r0 has"
            await settled(made, {"r0": "g1", "r1": "g1", "r2": "g2", "r3": "g1", "r4": "g2"})
            total = await one.store.request(b"GET", PREFIX + b"total:a")
            assert int(total) == 3
            # A node less, as a gateway sees it; and a leader's word, whoever that is, is later than all of these.
            one.slots.stand("a", [("n2", 2)])
            assert int(await one.store.request(b"GET", PREFIX + b"total:a")) == 2
            assert await place(one, "n2", "a", "draining", 1, 2)
            await one.store.request(b"SET", keeper.LEADER, b"1")
            other.slots.stand("a", [("n1", 1), ("n2", 2)])
            assert int(await other.store.request(b"GET", PREFIX + b"total:a")) == 0, "there is a leader"

    asyncio.run(work())


def test_what_a_ticket_avoids_by_now_is_heard_though_it_is_not_the_first(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 1) as (one,):
            await place(one, "n1", "a", "resident", 1, 1)
            first, second = (Wanted(f"r{n}", "a", PICKY, preferred=(NEVER + "n1",)) for n in (1, 2))
            for wanted in (first, second):
                answer, more = await one.ask(wanted)
                assert answer.position
            second.preferred = (NEVER + "n3",)
            assert (await asyncio.wait_for(more, 8)).node == "n1"

    asyncio.run(work())


def test_a_dead_gateway_holds_up_nobody_though_one_of_its_requests_waits_at_the_head(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 3) as (holds, dies, waits):
            await place(holds, "n1", "a", "resident", 1, 1)
            assert (await holds.ask(Wanted("h", "a")))[0].node == "n1"
            await dies.ask(Wanted("d", "a", PICKY, preferred=(HEAD, LATE + "n2")))
            await dies.ask(Wanted("e", "a"))
            await dies.kill()
            for one in (holds, waits):
                one.tasks.pop().cancel()  # nobody is helped by asking again
            lates = [(await waits.ask(Wanted(f"w{n}", "a")))[1] for n in range(3)]
            holds.slots.end("h")
            for number, late in enumerate(lates):
                assert (await asyncio.wait_for(late, 8)).node == "n1"
                waits.slots.end(f"w{number}")

    asyncio.run(work())


def test_who_does_not_listen_for_a_moment_stands_half_a_second_further_back_however_often_it_was_its_turn(
    store: Server,
) -> None:
    async def work() -> None:
        async with gateways(store.url, 2) as (holds, deaf):
            await place(holds, "n1", "a", "resident", 1, 1)
            await place(holds, "n1", "b", "resident", 1, 1)
            assert (await holds.ask(Wanted("h", "a")))[0].node == "n1"
            listens, asks = deaf.tasks[1:]
            for task in (listens, asks):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            for id in ("d1", "d2"):
                assert (await deaf.ask(Wanted(id, "a", key=id)))[0].position
            holds.slots.end("h")
            for turn in range(5):
                await holds.ask(Wanted(f"o{turn}", "b"))
                holds.slots.end(f"o{turn}")
            seconds, micros = await holds.store.request(b"TIME")
            waiting = await holds.store.request(b"ZRANGE", PREFIX + b"wait:a:0", b"0", b"-1", b"WITHSCORES")
            assert waiting[::2] == [b"g2 d1", b"g2 d2"]
            latest = int(seconds) * 1_000_000 + int(micros) + 600_000
            assert all(float(score) < latest for score in waiting[1::2])

    asyncio.run(work())


def test_a_slot_that_comes_free_costs_nothing_for_those_whose_models_have_none(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 2) as (one, other):
            for gateway in (one, other):
                gateway.tasks.pop().cancel()  # this test asks alone
            for number in range(10):
                model = f"m{number}"
                await place(one, "n1", model, "resident", 1, 1)
                assert (await one.ask(Wanted(f"h{number}", model)))[0].node == "n1"
                for ticket in range(20):
                    await other.ask(Wanted(f"t{number}-{ticket}", model, PICKY, preferred=(f"{LATE}n{ticket}",)))
            await one.store.request(b"CONFIG", b"RESETSTAT")
            one.slots.claim(Wanted("more", "m0"), "n1")
            one.slots.end("more")
            await one.store.request(b"PING")
            stats = (await one.store.request(b"INFO", b"commandstats")).decode()
            calls = {line.partition(":")[0]: int(line.partition("calls=")[2].partition(",")[0]) for line in
                     stats.split("\r\n") if "calls=" in line}  # fmt: skip
            assert calls["cmdstat_hget"] < 20, "none of the 200 tickets is looked at"

    asyncio.run(work())
