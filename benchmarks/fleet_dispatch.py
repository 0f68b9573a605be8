"""What a decision where a request runs costs, as it is wired and as a pure function, for fleets of any size.

As it is wired: a gateway asks the limits and a slot in one call (`corral.store.limits`, the scripts ADMIT_SLOT and, for
a key with limits of tokens, RESERVE_SLOT), hears the answer, and gives both back. Its own CPU counts against the bar;
what Valkey spends on it is beside. The pure function (`corral.fleet.ledger`) decides where there is no Valkey.
"""

from __future__ import annotations

import asyncio
import random
import re
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.servers import Server, valkey

from corral.fleet.ledger import Ledger
from corral.fleet.placement import Demand, Host, Planner, Stand
from corral.fleet.slots import PlaceState, step_of
from corral.fleet.tickets import Request
from corral.store import keeper, leases
from corral.store.budget import GRANTS, Budget
from corral.store.limits import Limits
from corral.store.slots import Answer, Slots, Wanted
from corral.store.valkey import Valkey

BAR = 50.0
SIZES = (10, 100, 1000)
MODELS, SLOTS = 100, 4
DECISIONS, PURE = 4_000, 20_000
AT_ONCE = 100
"""Requests that are asked in one turn of the event loop, one for each model."""
TURNS = (1, 4, 16)
"""Requests of one turn, where what they share is measured."""
KEYS = {
    "requests": {"rpm": 100_000_000, "concurrency": 1_000_000},
    "tokens too": {"rpm": 100_000_000, "concurrency": 1_000_000, "tpm": 10**12, "daily_tokens": 10**15},
}
"""Limits of a key, none of which is reached."""


def models_of(node: int) -> list[str]:
    """A tenth of the models stands on each node."""
    return [f"model-{number}" for number in range(node % 10, MODELS, 10)]


@dataclass
class Spent:
    """Microseconds a decision: CPU of the gateway, of the scripts by Valkey's own clock, and of Valkey as a whole."""

    gateway: float = 0.0
    scripts: float = 0.0
    valkey: float = 0.0


class Wired:
    """A gateway's part before a Valkey whose fleet has ``nodes``, half of whose slots are in use."""

    def __init__(self, server: Server, nodes: int, limits: dict[str, int]) -> None:
        self._server, self._nodes, self._budget = server, nodes, Budget("key", **limits)
        self._store = Valkey(server.url, scripts=leases.SCRIPTS + keeper.SCRIPTS, timeout=60.0)
        self._ears = Valkey(server.url, timeout=60.0)
        self._limits = Limits(self._store, "g")
        self._slots = self._limits.slots = Slots(self._store, "g", length=1 << 20)
        self._draw = random.Random(0)
        self._number = 0
        self._running: list[str] = []
        self._waiting = 0
        self._given = 0

    async def run(self) -> tuple[Spent, Spent, Spent]:
        """What a slot costs that is free, a ticket where none is, and to hand a slot on to the first ticket."""
        works = [asyncio.create_task(work) for work in (self._store.run(), keeper.listen(self._slots, self._ears))]
        while not (self._store.connected and self._ears.connected):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        try:
            await self._fleet()
            await self._fill(self._nodes * 20)
            slot, ticket, handed = Spent(), Spent(), Spent()
            await self._measure(slot, self._slot)
            await self._fill(self._nodes * 20)
            await self._measure(ticket, self._ticket)
            await self._measure(handed, self._hand_on)
            return slot, ticket, handed
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)

    async def _fleet(self) -> None:
        await self._store.request(b"FLUSHALL")
        for key in (keeper.GRANTS, GRANTS, leases.EPOCH):
            await self._store.request(b"SET", key, b"1")
        for node in range(self._nodes):
            for model in models_of(node):
                await keeper.place(self._store, f"node-{node}", model, "resident", 1, SLOTS, step_of(SLOTS, 0, 0))
        self._slots.told, self._slots.led = self._store.connections, True

    async def _measure(self, spent: Spent, work: Callable[[], Awaitable[int]]) -> None:
        await self._store.request(b"CONFIG", b"RESETSTAT")
        server, began = cpu(self._server.process.pid), time.process_time()
        count = await work()
        own, server = time.process_time() - began, cpu(self._server.process.pid) - server
        stats = (await self._store.request(b"INFO", b"commandstats")).decode()
        found = re.search(r"cmdstat_evalsha:calls=\d+,usec=(\d+)", stats)
        assert found is not None
        spent.gateway, spent.scripts, spent.valkey = own / count * 1e6, int(found[1]) / count, server / count

    def _ask(self, model: str) -> str:
        self._number += 1
        name = f"r{self._number}"
        self._limits.admit(
            self._budget, name, time.monotonic(), lambda verdict: None, 1000, Wanted(name, model), self._heard
        )
        return name

    def _heard(self, answer: Answer) -> None:
        assert not answer.away and not answer.full
        if answer.position:
            self._waiting += 1
        else:
            self._given += 1

    async def _turn(self, models: list[str]) -> list[str]:
        names = [self._ask(model) for model in models]
        await self._store.request(b"PING")  # answered after them
        return names

    async def _fill(self, count: int) -> None:
        for first in range(0, count, AT_ONCE):
            self._running += await self._turn([f"model-{number}" for number in range(min(AT_ONCE, count - first))])
        assert not self._waiting

    def _drawn(self) -> list[str]:
        return [f"model-{number}" for number in self._draw.sample(range(MODELS), AT_ONCE)]

    async def _slot(self) -> int:
        for _ in range(0, DECISIONS, AT_ONCE):
            for name in await self._turn(self._drawn()):
                self._slots.end(name)
                self._limits.release(self._budget, name, 500)
            await self._store.request(b"PING")
        assert not self._waiting
        return DECISIONS

    async def _ticket(self) -> int:
        for _ in range(0, DECISIONS, AT_ONCE):
            await self._turn(self._drawn())
        assert self._waiting == DECISIONS
        return DECISIONS

    async def _hand_on(self) -> int:
        given, ended = self._given, self._running[:DECISIONS]
        for first in range(0, len(ended), AT_ONCE):
            for name in ended[first : first + AT_ONCE]:
                self._slots.end(name)
                self._limits.release(self._budget, name, 500)
            while self._given - given < min(first + AT_ONCE, len(ended)):
                await self._store.request(b"PING")
        return len(ended)


class Together:
    """Requests that are admitted, some in a turn of the event loop: what a turn costs."""

    def __init__(self, server: Server, limits: dict[str, int]) -> None:
        self._budget = Budget("key", **limits)
        self._store = Valkey(server.url, scripts=leases.SCRIPTS, timeout=60.0)
        self._limits = Limits(self._store, "g")

    async def run(self) -> Iterable[tuple[int, float, float, float]]:
        """Of each number of calls in a turn: calls a write, ms until all are answered, calls a second."""
        work = asyncio.create_task(self._store.run())
        while not self._store.connected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        try:
            await self._store.request(b"FLUSHALL")
            for key in (GRANTS, leases.EPOCH):
                await self._store.request(b"SET", key, b"1")
            return [(many, *await self._measure(many)) for many in TURNS]
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _measure(self, many: int) -> tuple[float, float, float]:
        reads, took = await self._reads(), 0.0
        for turn in range(DECISIONS // many):
            heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            began = time.perf_counter()
            for number in range(many):
                last = number == many - 1
                done = (lambda verdict, heard=heard: heard.set_result(None)) if last else (lambda verdict: None)
                self._limits.admit(self._budget, f"{many}-{turn}-{number}", time.monotonic(), done, 1000)
            await heard
            took += time.perf_counter() - began
        turns = DECISIONS // many
        # What the store reads at once is what was written at once: a turn is smaller than its buffer, 16 KiB.
        reads = await self._reads() - reads - 1
        return turns * many / reads, took / turns * 1e3, turns * many / took

    async def _reads(self) -> int:
        found = re.search(r"total_reads_processed:(\d+)", (await self._store.request(b"INFO", b"stats")).decode())
        assert found is not None
        return int(found[1])


def together() -> None:
    """Print what it saves that the calls of one turn share a write."""
    print(f"  {'calls in a turn':46}{'a write':>8}{'ms':>10}{'a second':>11}")
    with tempfile.TemporaryDirectory() as folder, valkey(Path(folder)) as server:
        for about, limits in KEYS.items():
            for many, written, took, rate in asyncio.run(Together(server, limits).run()):
                print(f"  {f'{many:5}, limits of {about}':46}{written:8.1f}{took:10.2f}{rate:11,.0f}", flush=True)


def cpu(pid: int) -> float:
    """Microseconds of CPU that a process has used."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e3


@contextmanager
def _timed(found: list[float]) -> Iterator[None]:
    began = time.process_time()
    yield
    found.append((time.process_time() - began) / PURE * 1e6)


def pure(nodes: int) -> list[float]:
    """Microseconds of CPU of the pure function: for a slot that is asked for and given back, and for a ticket."""
    ledger = Ledger(queue_length=1 << 20)
    for node in range(nodes):
        for model in models_of(node):
            ledger.place(f"node-{node}", model, PlaceState.RESIDENT, 1, 0.0, SLOTS, step_of(SLOTS, 0, 0))
    draw, found = random.Random(0), list[float]()
    for number in range(nodes * 20):
        ledger.ask(Request(f"busy{number}", "g", f"model-{number % MODELS}"), (), 0.0)
    requests = [
        Request(f"r{n}", "g", f"model-{draw.randrange(MODELS)}", f"key{n % 50}", 1000, 4.0) for n in range(PURE)
    ]
    with _timed(found):
        for request in requests:
            ledger.ask(request, (), 1.0)
            ledger.release(request.id, 1.0)
    for number in range(nodes * 40):
        ledger.ask(Request(f"full{number}", "g", f"model-{number % MODELS}"), (), 1.0)
    with _timed(found):
        for request in requests:
            ledger.ask(request, (), 2.0)
    return found


def planned(nodes: int) -> list[float]:
    """Milliseconds of CPU of one plan of the leader: where nothing is to change, where little, and where much is.

    Little: one model is asked for more than it has slots. Much: each is asked for anew, half of them more than they
    have slots, and half of them are waited for.
    """
    names, found = [f"model-{number}" for number in range(MODELS)], list[float]()
    for changed in ("nothing", "little", "much"):
        draw = random.Random(0)
        hosts = [Host(f"node-{node}", max_models=10, slots=SLOTS, held=frozenset(names)) for node in range(nodes)]
        for node, host in enumerate(hosts):
            for name in models_of(node):
                host.places[name] = Stand(PlaceState.RESIDENT, 0.0, draw.randrange(SLOTS + 1), SLOTS)
        demands = {name: Demand(name, nodes / MODELS) for name in names}
        for number, demand in enumerate(demands.values()):
            if changed == "little" and not number:
                demand.rate *= 10.0
            if changed == "much":
                demand.rate *= draw.uniform(0.0, 20.0)
                demand.waiting = draw.choice((0, 5))
        began = time.process_time()
        Planner(hosts, demands, 1000.0).plan()
        found.append((time.process_time() - began) * 1e3)
    return found


def dispatch() -> bool:
    """Print what a decision costs; whether the bar holds."""
    print(f"  {'a decision, us of CPU':46}{'a slot':>8}{'a ticket':>10}{'handed on':>11}")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder, valkey(Path(folder)) as server:
        for about, limits in KEYS.items():
            for nodes in SIZES:
                found = asyncio.run(Wired(server, nodes, limits).run())
                worst = max(worst, *(spent.gateway for spent in found))
                whole = f"{nodes:5} nodes, {MODELS} models, limits of {about}"
                for name, figures in (
                    (whole, [spent.gateway for spent in found]),
                    ("        its scripts in Valkey", [spent.scripts for spent in found]),
                    ("        all of Valkey", [spent.valkey for spent in found]),
                ):
                    print(f"  {name:46}{figures[0]:8.1f}{figures[1]:10.1f}{figures[2]:11.1f}", flush=True)
    for nodes in SIZES:
        slot, ticket = pure(nodes)
        worst = max(worst, slot, ticket)
        print(f"  {f'{nodes:5} nodes, {MODELS} models, without Valkey':46}{slot:8.1f}{ticket:10.1f}", flush=True)
    print(f"  {'a plan, ms of CPU':46}{'nothing':>8}{'little':>10}{'much':>11}")
    for nodes in SIZES:
        nothing, little, much = planned(nodes)
        name = f"{nodes:5} nodes, {MODELS} models"
        print(f"  {name:46}{nothing:8.1f}{little:10.1f}{much:11.1f}", flush=True)
    held = "holds" if worst <= BAR else "DOES NOT HOLD"
    print(f"  bar: the gateway's own {worst:.1f} us, at most {BAR:g}: {held}")
    return worst <= BAR
