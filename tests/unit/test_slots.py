"""Slots and tickets in a real Valkey and a real Redis: as the ledger has them, whatever gateways and stores do."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.limits import flush
from support.servers import Server
from support.slots import Gateway, gateways, granting, place, settled
from support.twin import Twin
from support.witness import Witness

from corral.fleet.slots import PlaceState
from corral.fleet.tickets import HEAD, LATE, NEVER, PICKY
from corral.store import keeper
from corral.store.budget import PREFIX
from corral.store.slots import Wanted
from corral.store.valkey import ValkeyDown

WORDS = ("n1", "n2", "n3", "n1", "n2", "!n1", "!n2", "~n1", "~n3", HEAD, HEAD + "5000000")

operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("ask"),
            st.sampled_from("ab"),
            st.sampled_from((0, 0, 0, 1, 2)),
            st.lists(st.sampled_from(WORDS), max_size=3).map(tuple),
        ),
        st.tuples(st.just("end"), st.integers(0, 30)),
        st.tuples(st.just("read"), st.integers(0, 30)),
        st.tuples(
            st.just("place"),
            st.sampled_from(("n1", "n2", "n3")),
            st.sampled_from("ab"),
            st.sampled_from(list(PlaceState)),
            st.sampled_from((1, 2, 8)),
        ),
    ),
    max_size=60,
)


@settings(max_examples=40, suppress_health_check=list(HealthCheck), derandomize=True)
@given(steps=operations)
def test_the_store_gives_what_the_ledger_gives(store: Server, steps: list[tuple[Any, ...]]) -> None:
    """One after the other, from three gateways: the same slots to the same requests, the same tickets."""

    async def work() -> None:
        async with Witness(store.url) as seen, gateways(seen.url, 3) as made:
            twin = Twin()
            given: dict[str, str] = {}
            late: dict[str, asyncio.Future[Any]] = {}
            owner: dict[str, Gateway] = {}
            generation = 0
            for node, model in (("n1", "a"), ("n2", "b")):
                assert await place(made[0], node, model, "resident", generation, 2)
            for step in steps:
                held = sorted([*given, *late])
                if step[0] == "ask":
                    id = f"r{len(owner):03}"
                    owner[id] = gateway = made[len(owner) % 3]
                    picky = any(word[0] in (LATE, NEVER) for word in step[3])
                    wanted = Wanted(id, step[1], step[2] + (PICKY if picky else 0), id, preferred=step[3])
                    answer, more = await gateway.ask(wanted)
                    if answer.node:
                        given[id] = answer.node
                    else:
                        late[id] = more
                elif step[0] == "place":
                    generation += 1
                    _, node, model, state, slots = step
                    assert await place(made[0], node, model, state.value, generation, slots)
                    assert not await place(made[1], node, model, "resident", generation - 1, 99)
                elif held:
                    id = held[step[1] % len(held)]
                    if step[0] == "read":
                        owner[id].slots.read(id)
                    else:
                        owner[id].slots.end(id)
                        given.pop(id, None)
                        if id in late:
                            late.pop(id).cancel()
                    await owner[id].store.request(b"PING")
                await seen.look(PREFIX)
                await seen.seen()
                for told in twin.follow(seen.calls()):
                    for _, id, node, _ in told.grants:
                        async with asyncio.timeout(8):
                            assert (await late.pop(id)).node == node
                        given[id] = node
                # What nobody was to hear of was not given.
                assert not any(future.done() for future in late.values())
                assert given == {grant.request.id.split(" ")[1]: grant.node for grant in twin.ledger.grants.values()}
            await settled(made, {id: owner[id].name for id in [*given, *late]})

    asyncio.run(work())


async def slots_of(made: list[Gateway]) -> int:
    """How many slots the first gateway has, as the store counts."""
    texts = await made[-1].store.request(b"HVALS", PREFIX + b"held:" + made[0].name.encode())
    return sum(text.startswith(b"g ") for text in texts)


ENOUGH = 200
"""Requests that are to be served: on a machine that is busy it takes longer."""


class Fleet:
    """What truly runs on each place, as the callers see it."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.running: dict[str, set[str]] = {}
        self.ghosts: set[str] = set()
        self.ghosts_until = 0.0
        """What a gateway that died had running counts until its lease may have ended."""
        self.served = 0
        self.errors: list[str] = []

    def begin(self, id: str, node: str) -> None:
        for others in self.running.values():
            if id in others:
                self.errors.append(f"{id} runs twice")
        if self.ghosts and time.monotonic() > self.ghosts_until:
            for others in self.running.values():
                others -= self.ghosts
        here = self.running.setdefault(node, set())
        here.add(id)
        if len(here) > self.slots:
            self.errors.append(f"{node} is over-committed: {sorted(here)}")

    def end(self, id: str, node: str) -> None:
        self.running[node].discard(id)
        self.served += 1


async def caller(gateway: Gateway, fleet: Fleet, name: str, until: float, draw: random.Random) -> None:
    """Ask, run, give back; ask anew where the store was away, for as long as it takes, and until enough were served."""
    number = 0
    while time.monotonic() < until or fleet.served <= ENOUGH:
        number += 1
        id = f"{name}-{number}"
        answer, more = await gateway.ask(Wanted(id, "a", key=name))
        if answer.away or answer.full:
            await asyncio.sleep(0.02)
            continue
        if not answer.node:
            if draw.random() < 0.1:
                await asyncio.sleep(draw.random() * 0.05)
                if not more.done():
                    gateway.slots.end(id)
                    continue
            answer = await asyncio.wait_for(more, 20)
            if answer.away:
                gateway.slots.end(id)
                continue
        fleet.begin(id, answer.node)
        await asyncio.sleep(draw.random() * 0.02)
        if draw.random() < 0.5:
            fleet.end(id, answer.node)
            gateway.slots.end(id)
        else:  # and its end is told in the turn after
            fleet.end(id, answer.node)
            await asyncio.sleep(0)
            gateway.slots.end(id)


@pytest.mark.parametrize("trouble", ["none", "stall", "flush", "kill"])
def test_no_slot_is_given_twice_and_nobody_is_lost(store: Server, trouble: str) -> None:
    """Four gateways, eight callers each, six slots: whatever becomes of the store, all are counted at the end."""

    async def work() -> None:
        # Only a store that is halted is to be away; a busy machine's may take as long for an answer.
        async with gateways(store.url, 4, lease=5.0, patience=0.3 if trouble == "stall" else 5.0) as made:
            fleet = Fleet(3)
            for node in ("n1", "n2"):
                await place(made[0], node, "a", "resident", 1, 3)
            until = time.monotonic() + 3.0
            callers = [
                asyncio.create_task(caller(one, fleet, f"{one.name}c{number}", until, random.Random(number)))
                for one in made
                for number in range(8)
            ]
            await asyncio.sleep(1.0)
            if trouble == "stall":
                store.process.send(signal.SIGSTOP)
                await asyncio.sleep(0.6)
                store.process.send(signal.SIGCONT)
            elif trouble == "flush":
                await flush(int(store.url.rpartition(":")[2].partition("/")[0]))
                await granting(made[0])
                for node in ("n1", "n2"):  # the leader sees that the store forgot
                    await place(made[0], node, "a", "resident", 2, 3)
            elif trouble == "kill":
                fleet.ghosts_until = time.monotonic() + 5.0 - 1.5  # it was renewed within the last second
                fleet.ghosts = {id for here in fleet.running.values() for id in here if id.startswith("g1")}
                for task in callers[:8]:
                    task.cancel()
                await made[0].kill()
                callers = callers[8:]
                channel = PREFIX + b"wake:g1"
                while (await made[1].store.request(b"PUBSUB", b"NUMSUB", channel))[1]:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                before = await slots_of(made)
                await asyncio.sleep(1.0)
                assert await slots_of(made) == before, "its tickets took slots after it had died"
            await asyncio.wait_for(asyncio.gather(*callers), 30)
            assert not fleet.errors
            assert fleet.served > ENOUGH
            async with asyncio.timeout(10):  # after the next renewal nothing is held
                while True:
                    try:
                        await settled(made, {})
                        break
                    except (AssertionError, ValkeyDown):
                        await asyncio.sleep(0.2)

    asyncio.run(work())


def test_the_slots_of_a_gateway_that_is_killed_return_with_its_lease_and_not_before(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 2, lease=2.0) as made:
            dead, alive = made
            await place(alive, "n1", "a", "resident", 1, 2)
            for number in range(2):
                answer, _ = await dead.ask(Wanted(f"d{number}", "a"))
                assert answer.node == "n1"
            ticket, _ = await dead.ask(Wanted("d-waits", "a"))
            assert ticket.position == 1
            # From its last renewal on, however long this machine halts after that.
            began = time.monotonic()
            await keeper.renew(dead.slots)
            await dead.kill()
            answer, more = await alive.ask(Wanted("a1", "a"))
            assert answer.position == 2
            late = await asyncio.wait_for(more, 10)
            assert late.node == "n1"
            assert time.monotonic() - began >= 1.4, "it could still have told that they run"
            await settled([dead, alive], {"a1": "g2"})

    asyncio.run(work())
