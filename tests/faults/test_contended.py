"""Few slots, and more who want one: overload, a store that forgets who has which, a node without a model in memory."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
from support.fleet import MODEL, Fleet
from support.leader import Leader
from support.load import CHAT, TOLD, WHOLE, after, body_of
from support.process import until

Matrix = Callable[[str, str, str], None]

SLOTS, PLACES = 8, 16
"""Of both nodes together, and in the queue (`contended` in conftest.py)."""
TIMES, REFUSED_WITHIN, GOODPUT = 6, 0.1, 0.9
TOKENS = 20
REBUILT_WITHIN = 2.0
FLUSHES = 9
BIG, LOADS = "big:latest", 5.0
"""A model, and the seconds that it takes to load (conftest.py)."""
SETTLED_WITHIN, MORE = 5.0, 1.0
"""Seconds after a kill, and those by which a first token may be later than the latest of a fleet that is warm."""


@dataclass
class Crowd:
    """Callers that ask again and again, and wait for a second or two where they are refused; (began, ended, status) of
    each request. ``late`` is how late this process was woken (seconds): what the machine adds, not the gateway.
    """

    url: str
    key: str
    seen: list[tuple[float, float, int]] = field(default_factory=list)
    late: list[float] = field(default_factory=lambda: [0.0])

    async def ask(self, count: int, warm: float, seconds: float) -> tuple[float, float]:
        """Have so many callers ask, one after the other from the start; the time once all had, and the time then."""
        tasks = [asyncio.create_task(self._call(warm * number / count / 2)) for number in range(count)]
        tasks.append(asyncio.create_task(self._watch()))
        await asyncio.sleep(warm)
        began = time.monotonic()
        await asyncio.sleep(seconds)
        ended = time.monotonic()
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, asyncio.CancelledError), outcome
        return began, ended

    async def _call(self, pause: float) -> None:
        address, content = urlsplit(self.url), body_of(CHAT, MODEL, TOKENS)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {self.key}\r\n"
        head += f"Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        await asyncio.sleep(pause)
        while True:
            began = time.monotonic()
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            try:
                writer.write(head.encode() + content)
                answer = await reader.read()
            finally:
                writer.close()
            status = int(answer[9:12])
            self.seen.append((began, time.monotonic(), status))
            if status == 503:
                refused = b"retry-after: " in answer.lower() and f"wait for '{MODEL}' already".encode() in answer
                assert refused, answer
                await asyncio.sleep(random.uniform(1.0, 2.0))
            else:
                assert status == 200 and b'"done":true' in answer, answer

    async def _watch(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                due = time.monotonic() + 0.005
                await asyncio.sleep(0.005)
                self.late.append(time.monotonic() - due)
        raise asyncio.CancelledError


def test_six_times_what_fits_is_refused_at_once_and_costs_no_answer(contended: Fleet, matrix: Matrix) -> None:
    rates: list[float] = []
    crowds: list[Crowd] = []
    waits: list[float] = []
    for count, warm in ((SLOTS, 2.0), (TIMES * (SLOTS + PLACES), 4.0)):
        crowd = Crowd(contended.stack.url, contended.stack.key)
        began, ended = asyncio.run(crowd.ask(count, warm, 10.0))
        whole = sum(status == 200 and began < end < ended for _, end, status in crowd.seen)
        rates.append(whole / (ended - began))
        waits = sorted(end - at for at, end, status in crowd.seen if status == 503 and at > began)
        crowds.append(crowd)
        assert bool(waits) == (count > SLOTS)
        store = Leader(contended.valkey.url)
        until(lambda store=store: store.counts(MODEL) == (0, 0), "all have left")  # type: ignore[misc]
    share, p99, late = rates[1] / rates[0], waits[len(waits) * 99 // 100], max(crowds[1].late)
    seen = f"{len(waits)} refused, median {waits[len(waits) // 2] * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms"
    seen += f", woken up to {late * 1e3:.0f} ms late; {rates[1]:.1f} of {rates[0]:.1f} answers/s, {share:.0%}"
    bar = f"refusal <= {REFUSED_WITHIN * 1e3:.0f} ms (p99) and how late its caller's process is woken at most"
    matrix(f"overload, {TIMES} x slots and queue", f"{bar}; goodput >= {GOODPUT:.0%} of the peak", seen)
    assert p99 <= REFUSED_WITHIN + late
    assert share >= GOODPUT


def test_a_flush_under_load_gives_no_slot_twice(contended: Fleet, matrix: Matrix) -> None:
    store = Leader(contended.valkey.url)
    nodes = contended.nodes.values()
    took, lost, most = [], [], []

    def connections() -> float:
        return contended.sum_of("corral_limit_store_connections_total")

    def in_use() -> bool:
        """As many run as there are slots, and on no node more: whatever was before is over."""
        counted = store.waiting(MODEL) >= SLOTS // 2 and store.counts(MODEL)[0] == SLOTS
        return counted and max(node.work()["running"] for node in nodes) <= SLOTS // 2

    with contended.load(clients=2 * SLOTS, paths=[CHAT], tokens=[40, 8, 20], name="flushed") as load:
        load.more(30)
        # One at least at which nobody missed the store, and three in all.
        while len(took) < 3 or (all(lost) and len(took) < FLUSHES):
            before = connections()
            load.until(lambda _: in_use(), "all is in use")
            for node in nodes:
                node.count_anew()
            store.ask(b"FLUSHALL")
            flushed = time.monotonic()
            until(lambda: contended.store_used() and store.counts(MODEL)[1] > 0, "it is rebuilt", every=0.02)
            took.append(time.monotonic() - flushed)
            load.until(lambda answers, at=flushed: len(after(answers, at)) >= SLOTS, "slots are given")  # type: ignore[misc]
            most.append(max(node.work()["most"] for node in nodes))
            lost.append(connections() > before)
    until(lambda: store.counts(MODEL) == (0, 0), "nothing is held")
    seen = f"{max(took):.2f} s, at most {max(most)} of {SLOTS // 2} slots a node in use, "
    seen += f"{sum(lost)} of {len(lost)} flushes with a lost connection, {len(load.answers)} requests whole"
    slack = f"{SLOTS // 4} more on a node where a gateway lost its connection, which is not so at each flush"
    bar = f"rebuilt <= {REBUILT_WITHIN:g} s, no slot granted twice ({slack})"
    matrix("Valkey flushed under load", bar, seen)
    assert load.unlike(WHOLE) == []
    assert max(took) <= REBUILT_WITHIN
    # On a machine that halts for 50 ms a gateway misses the store, and gives its share beside what the other one runs.
    allowed = [SLOTS // 2 + missed * SLOTS // 4 for missed in lost]
    assert all(SLOTS // 2 <= ran <= bound for ran, bound in zip(most, allowed, strict=True)), (most, lost)
    assert not all(lost), "each flush had a lost connection: whether slots are granted twice was not seen"


def test_a_node_that_comes_back_cold_keeps_nobody_waiting_for_its_load(contended: Fleet, matrix: Matrix) -> None:
    cold = contended.nodes["node-1"]

    def loads(name: str) -> None:
        asked = {"model": BIG, "prompt": "a", "options": {"num_predict": 1}}
        httpx.post(contended.nodes[name].url + "/api/generate", json=asked, timeout=60).raise_for_status()
        until(lambda: name in contended.residents(BIG), f"it is known that {name} has it")

    for name in contended.nodes:
        loads(name)
    # As many as one node has slots for: nobody waits for one.
    with contended.load(BIG, clients=3, paths=[CHAT], tokens=[8], name="cold", fresh=True) as load:
        load.more(20, cold.name)
        usual = max(answer.first - answer.began for answer in list(load.answers))
        cold.kill()
        killed = time.monotonic()
        load.until(lambda _: time.monotonic() > killed + SETTLED_WITHIN, "the fleet has settled")
        cold.start()
        contended.all_ready()
        back = time.monotonic()
        load.more(40)
        loading = time.monotonic()
        loads(cold.name)
        load.more(5, cold.name)
    contended.warm()
    assert load.unlike(WHOLE, TOLD) == []
    # While it loads, whoever has it do so: the last second is no wait that could be told from any other.
    meanwhile = [answer for answer in load.answers if back < answer.began < loading + LOADS - MORE]
    assert any(answer.began > loading for answer in meanwhile)
    slowest = max(answer.first - answer.began for answer in meanwhile)
    bar = f"first token <= the latest of the warm fleet and {MORE:g} s, its load takes {LOADS:g} s"
    matrix("node comes back cold", bar, f"{slowest:.2f} s of {len(meanwhile)} before it is warm, {usual:.2f} s usual")
    assert slowest <= usual + MORE, [str(answer) for answer in meanwhile if answer.node == cold.name]
