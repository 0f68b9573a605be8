"""Slots in a real Valkey and a real Redis as the ledger has them, call by call, whatever happens at once."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support import witness
from support.limits import flush
from support.servers import STORES, Server, valkey
from support.slots import Gateway, gateways, place
from support.twin import Twin
from support.witness import Witness

from corral.fleet.slots import PlaceState
from corral.fleet.tickets import HEAD, LATE, NEVER, PICKY
from corral.store import keeper
from corral.store.lua import PREFIX
from corral.store.slots import Wanted
from corral.store.valkey import ValkeyDown

NODES, MODELS = ("n1", "n2", "n3"), "aaabbc"
WORDS = ("n1", "n2", "n3", LATE + "n1", LATE + "n2", NEVER + "n1", NEVER + "n3", HEAD, HEAD + "300000")
STATES = [PlaceState.RESIDENT] * 5 + list(PlaceState)
COST = 55440
"""us of a slot: over up to twelve slots, by weights of a half to two, it is whole, and so are all times of tickets."""
LEASE, PATIENCE, LENGTH = 1.0, 0.3, 10
CALLERS = 6
SECONDS = 6.0


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with valkey(tmp_path, program=request.param) as server:
        yield server


class Storm:
    """Gateways that ask, leave, die and come, and a store that is stopped and flushed, all at once."""

    def __init__(self, store: Server, seen: Witness, made: list[Gateway], seed: int) -> None:
        self.store, self.seen, self.made, self.seed = store, seen, made, seed
        self.number, self.generation = len(made), 0
        self.over = asyncio.Event()
        self.callers: dict[str, list[asyncio.Task[None]]] = {}

    def draw(self, name: str) -> random.Random:
        """The same for the same seed, whatever others have drawn."""
        return random.Random(f"{self.seed} {name}")

    def begin(self, gateway: Gateway) -> None:
        """Have its callers ask."""
        gateway.slots.gateways = lambda: len(self.made)
        names = [f"{gateway.name}c{number}" for number in range(CALLERS)]
        self.callers[gateway.name] = [asyncio.create_task(self.calls(gateway, name)) for name in names]

    async def end(self, gateway: Gateway, leaves: bool) -> None:
        """It dies, or leaves in order."""
        self.made.remove(gateway)
        callers = self.callers.pop(gateway.name)
        for task in callers:
            task.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        if leaves:
            await keeper.leave(gateway.slots)
        await gateway.kill()

    def come(self) -> None:
        """One more."""
        self.number += 1
        gateway = Gateway(self.seen.url, f"g{self.number}", LEASE, PATIENCE, len(self.made) + 1, LENGTH)
        self.made.append(gateway)
        self.begin(gateway)

    async def calls(self, gateway: Gateway, name: str) -> None:
        """Ask, wait or not, run, give back."""
        draw, slots, number = self.draw(name), gateway.slots, 0
        while not self.over.is_set():
            number += 1
            words = tuple(draw.sample(WORDS, draw.choice((0, 0, 1, 2))))
            picky = any(word[0] in (LATE, NEVER) for word in words)
            wanted = Wanted(
                f"{name}-{number}",
                draw.choice(MODELS),
                draw.choice((0, 0, 0, 1, 2)) + (PICKY if picky else 0),
                draw.choice(("k1", "k2", "k3", name)),
                COST * draw.randint(1, 20),
                draw.choice((0.5, 1.0, 1.0, 2.0)),
                draw.random() < 0.1,
                words,
            )
            answer, more = await gateway.ask(wanted)
            if answer.away or answer.full:
                if answer.away and draw.random() < 0.3:  # it uses its own share
                    slots.claim(wanted, draw.choice(NODES))
                await asyncio.sleep(draw.random() * 0.05)
                slots.end(wanted.id)
                continue
            if not answer.node:
                if picky and draw.random() < 0.3:
                    wanted.preferred = (draw.choice((LATE, NEVER)) + draw.choice(NODES),)
                try:
                    async with asyncio.timeout(draw.random() * 2.0):
                        answer = await more
                except TimeoutError:
                    answer.away = True
            if not answer.away:
                await asyncio.sleep(draw.random() * 0.01)
                slots.read(wanted.id)
                await asyncio.sleep(draw.random() * 0.03)
            slots.end(wanted.id)

    async def moves(self, name: str) -> None:
        """One of two who say what stands where, each of them at times what is no longer so."""
        draw = self.draw(name)
        while not self.over.is_set():
            await asyncio.sleep(draw.random() * 0.05)
            gateway = draw.choice(self.made)
            self.generation += 1
            number = max(1, self.generation - draw.choice((0, 0, 0, 1, 5, 50)))
            node, model, state = draw.choice(NODES), draw.choice(MODELS), draw.choice(STATES)
            with suppress(ValkeyDown):
                await place(gateway, node, model, state, number, draw.choice((1, 2, 2, 4)))
            if draw.random() < 0.2:  # without a leader
                some = draw.sample(NODES, 2)
                gateway.slots.stand(draw.choice(MODELS), [(node, draw.choice((1, 2))) for node in some])

    async def troubles(self) -> None:
        """What befalls them, in an order that is drawn."""
        draw = self.draw("troubles")
        all_of_it = ["kill", "leave", "stall", "pause", "flush", "flush", "cut", "cut", "leader", "look", "look"]
        draw.shuffle(all_of_it)
        for trouble in all_of_it:
            await asyncio.sleep(SECONDS / len(all_of_it) * draw.uniform(0.5, 1.0))
            if trouble in ("kill", "leave"):
                await self.end(draw.choice(self.made), trouble == "leave")
                self.come()
            elif trouble == "stall":
                self.store.process.send(signal.SIGSTOP)
                await asyncio.sleep(draw.uniform(0.2, 0.6))
                self.store.process.send(signal.SIGCONT)
            elif trouble == "pause":
                await self.seen.do((b"CLIENT", b"PAUSE", b"%d" % draw.randint(100, 500), b"ALL"))
            elif trouble == "flush":
                await flush(int(self.store.url.rpartition(":")[2].partition("/")[0]))
            elif trouble == "cut":
                self.seen.cut(draw.randrange(100))
            elif trouble == "leader":
                await self.seen.do((b"SET", keeper.LEADER, b"1"))
                await asyncio.sleep(0.3)
                await self.seen.do((b"DEL", keeper.LEADER))
            else:
                await self.seen.look(PREFIX)
        # One more, of which no flush has the store forget that its lease has yet to run out.
        gateway = draw.choice(self.made)
        await self.lives(gateway.name, True)
        await self.end(gateway, False)
        self.come()
        await self.lives(gateway.name, False)

    async def lives(self, name: str, does: bool) -> None:
        """Wait until the store has a gateway's lease, or has it no more."""
        async with asyncio.timeout(20):
            while ((await self.seen.do((b"ZSCORE", PREFIX + b"live", name.encode())))[0] is not None) is not does:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def rages(self) -> None:
        """All of it, until nobody holds anything."""
        for gateway in self.made:
            self.begin(gateway)
        movers = [asyncio.create_task(self.moves(name)) for name in ("first", "second")]
        await self.troubles()
        self.over.set()
        await asyncio.gather(*movers, *(task for tasks in self.callers.values() for task in tasks))
        await self.seen.look(PREFIX)
        async with asyncio.timeout(20):
            while (await self.seen.do((b"KEYS", PREFIX + b"held:*")))[0]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await self.seen.look(PREFIX)


def test_what_happens_at_once_is_what_the_ledger_says_in_the_stores_order(store: Server, tmp_path: Path) -> None:
    seed = int(os.environ.get("CORRAL_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
    kept = tmp_path / "calls"
    print(f"seed {seed} (CORRAL_TEST_SEED); what the store did is in {kept}, for support.witness.read")
    heard: dict[str, list[str]] = {}

    async def work() -> None:
        async with Witness(store.url) as seen:
            try:
                async with gateways(seen.url, 4, LEASE, PATIENCE, LENGTH) as made:
                    await Storm(store, seen, made, seed).rages()
                await seen.close()
            finally:
                witness.write(seen.calls(), kept)
            heard.update(seen.heard)

    asyncio.run(work())
    twin, published = Twin(), Counter[tuple[str, str]]()
    for told in twin.follow(witness.read(kept)):
        for gateway, id, node, generation in told.grants:
            published[f"{PREFIX.decode()}wake:{gateway}", f"{id} {node} {generation}"] += 1
    print(dict(twin.done))
    assert not twin.ledger.grants and not any(twin.ledger.queues.values()), "nobody holds anything any more"
    for channel, messages in heard.items():
        assert {(channel, message) for message in messages} <= set(published)
    seldom = ("flush", "look", "lapsed", "older word", "stand", "ungranted")
    for what in ("told", "ask grant", "ask ticket", "ask full", *seldom):
        assert twin.done[what], f"this run saw nothing of: {what}"
