"""Prompts that runners crash under: whose they are, who is blamed by all gateways together, and for how long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.limits import flush
from support.servers import Server

from corral.gateway.crashing import fingerprint, refused
from corral.gateway.recover import Failure, RetryBudget, classify, crashed, may_retry
from corral.store.suspects import CHANNEL, KEPT, KNOWN_MAX, SETTLED, TEXT, Suspects
from corral.store.valkey import Valkey, encode
from corral.wire.common import CAPS, Decoded
from corral.wire.decode import DECODERS

NODE = "node-1"


def decode(text: str = "a", route: str = "/api/chat", **more: Any) -> Decoded:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **more}
    return DECODERS[route](json.dumps(body).encode(), "r1", lambda model: None, CAPS)


def test_a_fingerprint_is_of_model_and_prompt_alone() -> None:
    same = [decode(), decode(options={"seed": 7}), decode(stream=False), decode(route="/v1/chat/completions")]
    assert len({fingerprint("t", each) for each in [*same, decode(model="m:latest")]}) == 1
    assert len({fingerprint("t", each) for each in [same[0], decode("b"), decode(model="other")]}) == 3


def test_a_fingerprint_is_a_tenants_own() -> None:
    assert fingerprint("t", decode()) != fingerprint("u", decode())


def test_a_refusal_is_a_400() -> None:
    assert (refused().status, refused().code) == (400, "prompt_refused")


class Gateway:
    """What a gateway knows of prompts, over a real store. `suspects` is the part under test."""

    def __init__(self, url: str) -> None:
        self.store = Valkey(url, scripts=(TEXT,), timeout=5.0)
        self.ears = Valkey(url, timeout=5.0)
        self.suspects = Suspects(self.store)
        self.ears.on_connect = lambda: self.ears.call(encode(b"SUBSCRIBE", CHANNEL), self._listens)
        self.ears.on_message = self._heard
        self.listens = asyncio.Event()
        self.marks = 0
        self.tasks = [asyncio.create_task(self.store.run()), asyncio.create_task(self.ears.run())]

    def _listens(self, reply: Any) -> None:
        self.listens.set()

    def _heard(self, message: Any) -> None:
        if message[0] == b"message":
            self.marks += message[2] == b"mark"
            self.suspects.heard(message[2])

    def crash(
        self, name: str, began: float, node: str = NODE, got_on: bool = False
    ) -> asyncio.Future[tuple[bool, int]]:
        """A prompt is at a crash, in an attempt that began then (monotonic seconds); what is heard of it."""
        told: asyncio.Future[tuple[bool, int]] = asyncio.get_running_loop().create_future()
        judged = lambda is_refused, crashes: told.set_result((is_refused, crashes))  # noqa: E731
        self.suspects.crashed(name, "m:latest", node, monotonic() - began, got_on, judged)
        return told

    async def has_runner(self, name: str, node: str = NODE) -> bool:
        """Ask to begin an attempt."""
        told: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.suspects.begin(name, "m:latest", node, told.set_result)
        return await told

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@asynccontextmanager
async def two(url: str) -> AsyncIterator[tuple[Gateway, Gateway]]:
    """Two gateways, over a store that knows nothing."""
    await flush(int(url.rpartition(":")[2].partition("/")[0]))
    made = Gateway(url), Gateway(url)
    try:
        async with asyncio.timeout(30):
            for one in made:
                await one.listens.wait()
                while not one.store.connected:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        yield made
    finally:
        for one in made:
            await one.stop()


def over(store: Server, work: Callable[[Gateway, Gateway], Awaitable[None]]) -> None:
    """Run a test over two gateways."""

    async def run() -> None:
        async with two(store.url) as (one, other):
            await work(one, other)

    asyncio.run(run())


async def heard(gateway: Gateway) -> None:
    """Have a gateway hear what the store has told by now."""
    marks = gateway.marks
    await gateway.store.request(b"PUBLISH", CHANNEL, b"mark")
    async with asyncio.timeout(30):
        while gateway.marks == marks:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def test_a_prompt_at_two_crashes_is_refused_by_every_gateway_for_ten_minutes(store: Server) -> None:
    async def work(one: Gateway, other: Gateway) -> None:
        assert await one.crash("killer", monotonic()) == (False, 1)
        await heard(other)
        assert list(other.suspects.suspects) == ["killer"]
        assert await other.crash("killer", monotonic(), "node-2") == (True, 0)
        await heard(one)
        for each in (one, other):
            assert (list(each.suspects.refused), each.suspects.suspects) == (["killer"], {})
            until = each.suspects.refused["killer"]
            assert until == pytest.approx(monotonic() + KEPT, abs=10.0)
            each.suspects.sweep(until - 1.0)
            assert each.suspects.known
            each.suspects.sweep(until)
            assert not each.suspects.known

    over(store, work)


def test_a_gateway_refuses_what_it_is_told_is_refused_before_the_channel_says_so(store: Server) -> None:
    async def work(one: Gateway, other: Gateway) -> None:
        one.ears.on_message = lambda message: None
        assert await one.crash("killer", monotonic()) == (False, 1)
        known: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def judged(is_refused: bool, crashes: int) -> None:
            known.set_result(is_refused and one.suspects.known and list(one.suspects.refused) == ["killer"])

        one.suspects.crashed("killer", "m:latest", "node-2", 0.0, False, judged)
        assert await known, "by then its caller hears of it"
        assert one.suspects.suspects == {}

    over(store, work)


def test_who_was_beside_it_at_one_crash_each_is_not_refused_though_the_killer_is_never_alone(store: Server) -> None:
    async def work(one: Gateway, other: Gateway) -> None:
        began = monotonic()
        first = [one.crash("killer", began, got_on=True), one.crash("a", began, got_on=True), other.crash("b", began)]
        assert await asyncio.gather(*first) == [(False, 1)] * 3
        began = monotonic()
        second = [
            one.crash("c", began, "node-2"),
            one.crash("killer", began, "node-2", got_on=True),
            other.crash("d", began, "node-2"),
        ]
        assert await asyncio.gather(*second) == [(False, 1), (True, 0), (False, 1)]
        await heard(one)
        # Nothing is held against the others: a crash of another prompt is their first one again.
        assert one.suspects.suspects == {}
        assert await one.crash("a", monotonic()) == (False, 1)

    over(store, work)


def test_one_that_was_alone_at_its_gateway_is_not_blamed_for_anothers(store: Server) -> None:
    async def work(one: Gateway, other: Gateway) -> None:
        for node in ("node-1", "node-2"):
            began = monotonic()
            told = await asyncio.gather(one.crash("killer", began, node), other.crash("innocent", began, node))
        assert told == [(False, 2), (False, 2)], "nobody can say which of them it was"
        assert (one.suspects.refused, other.suspects.refused) == ({}, {})
        # It is answered, wherever: the other one is left.
        one.suspects.clear("innocent")
        await heard(one)
        await heard(other)
        for each in (one, other):
            assert (list(each.suspects.refused), each.suspects.suspects) == (["killer"], {})

    over(store, work)


def test_of_two_at_two_crashes_it_was_the_one_that_got_no_further(store: Server) -> None:
    async def work(one: Gateway, other: Gateway) -> None:
        began = monotonic()
        await asyncio.gather(one.crash("killer", began), other.crash("innocent", began))
        began = monotonic()
        second = one.crash("killer", began, "node-2"), other.crash("innocent", began, "node-2", got_on=True)
        told = await asyncio.gather(*second)
        assert told == [(True, 0), (False, 0)]

    over(store, work)


def test_what_two_gateways_tell_of_one_crash_is_one_and_a_new_attempt_sees_another(store: Server) -> None:
    async def work(one: Gateway, other: Gateway) -> None:
        began = monotonic() - 1.0
        told = [one.crash("killer", began), other.crash("killer", began), one.crash("killer", began)]
        assert await asyncio.gather(*told) == [(False, 1)] * 3
        began = monotonic()
        await asyncio.sleep(2 * SETTLED)  # no runner is loaded in less
        assert await other.crash("late", began - 1.0) == (False, 1), "it was there at the first one"
        told = [one.crash("killer", began), other.crash("beside", began)]
        assert await asyncio.gather(*told) == [(True, 0), (False, 1)], "the same runner, loaded anew"
        assert await other.crash("late", monotonic(), "node-2") == (False, 1)

    over(store, work)


def test_requests_that_run_on_two_nodes_which_crash_together_are_at_one_crash_each(store: Server) -> None:
    async def work(one: Gateway, other: Gateway) -> None:
        began = monotonic() - 1.0
        told = [
            one.crash("many", began, "node-1"),
            one.crash("many", began, "node-2"),
            other.crash("many", began, "n3"),
        ]
        assert await asyncio.gather(*told) == [(False, 1)] * 3

    over(store, work)


def test_one_suspect_at_a_time_has_a_runner(store: Server) -> None:
    async def work(one: Gateway, other: Gateway) -> None:
        freed: list[int] = []
        other.suspects.on_free = lambda: freed.append(1)
        assert await one.has_runner("killer")
        assert await other.has_runner("killer"), "it need not be told from itself"
        assert not await other.has_runner("innocent")
        assert await other.has_runner("innocent", "node-2")
        other.suspects.leave("innocent", "m:latest", NODE)
        assert not await other.has_runner("innocent"), "it was another's"
        one.suspects.leave("killer", "m:latest", NODE)
        await heard(other)
        assert freed == [1]
        assert await other.has_runner("innocent")

    over(store, work)


def test_a_gateway_that_comes_later_hears_what_holds(store: Server) -> None:
    async def work(one: Gateway, other: Gateway) -> None:
        for node in ("node-1", "node-2"):
            await one.crash("killer", monotonic(), node)
        await one.crash("innocent", monotonic(), "node-3")
        for late in (Gateway(store.url), other):
            late.suspects.missed()
            async with asyncio.timeout(30):
                while not late.suspects.known:
                    late.suspects.sweep(monotonic())
                    await asyncio.sleep(0.01)
            assert (list(late.suspects.refused), list(late.suspects.suspects)) == (["killer"], ["innocent"])
            assert late.suspects.refused["killer"] == pytest.approx(monotonic() + KEPT, abs=10.0)
            if late is not other:
                await late.stop()

    over(store, work)


def test_without_a_store_nobody_is_blamed_and_no_attempt_waits(store: Server) -> None:
    async def work(one: Gateway, other: Gateway) -> None:
        await one.stop()
        for _ in range(3):
            assert await one.crash("a", monotonic()) == (False, 0)
        assert await one.has_runner("a") and await one.has_runner("b")
        assert one.suspects.refused == {}

    over(store, work)


async def play(one: Gateway, other: Gateway, rounds: list[tuple[frozenset[str], bool]]) -> None:
    """One prompt kills each runner that it is sent to; the others are answered where it is not."""
    crashes = 0
    for number, (innocents, with_killer) in enumerate(rounds):
        present = [name for name in ("killer", *sorted(innocents)) if name != "killer" or with_killer]
        if "killer" in one.suspects.refused:
            present = [name for name in present if name != "killer"]
        if "killer" in present:
            crashes += 1
            began = monotonic()
            told = [
                (one, other)[at % 2].crash(name, began, f"node-{number}", got_on=True)
                for at, name in enumerate(present)
            ]
            await asyncio.gather(*told)
        else:
            for name in present:
                one.suspects.clear(name)
        await heard(one)
        await heard(other)
        assert set(one.suspects.refused) <= {"killer"}
        assert one.suspects.refused.keys() == other.suspects.refused.keys()
    # Alone, it is known at once whose fault it was.
    while "killer" not in one.suspects.refused:
        assert crashes < 2 + len(rounds)
        crashes += 1
        await one.crash("killer", monotonic(), f"other-{crashes}", got_on=True)
        await heard(one)


@settings(max_examples=12, suppress_health_check=list(HealthCheck), derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.frozensets(st.sampled_from("abc"), max_size=3), st.booleans()), min_size=1, max_size=5),
)
def test_whoever_is_beside_it_the_killer_alone_is_refused(
    store: Server, rounds: list[tuple[frozenset[str], bool]]
) -> None:
    over(store, lambda one, other: play(one, other, rounds))


def test_what_is_known_is_bounded() -> None:
    known = Suspects(Valkey("redis://127.0.0.1:1/0"))
    for number in range(KNOWN_MAX + 5):
        known.heard(f"refused {number}".encode())
    assert len(known.refused) == KNOWN_MAX
    assert "0" not in known.refused


@pytest.mark.parametrize(
    "message",
    [
        "an error was encountered while running the model: unexpected EOF",
        "llama runner process has terminated: signal: killed",
        "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error",
        'Post "http://127.0.0.1:39021/completion": EOF',
        "do encode request: dial tcp 127.0.0.1:39021: connect: connection refused",
    ],
)
def test_a_runners_crash_is_told_from_a_nodes_failure(message: str) -> None:
    assert crashed(message)
    assert classify(500, False, message) is Failure.CRASH
    assert classify(400, False, message) is Failure.CALLER


def test_a_crash_is_retried_outside_the_budget_and_once() -> None:
    class History:
        attempts, orphaned, crashes, lost, connects, held_until = 1, 1, 1, 0, 0, 0.0

    budget = RetryBudget(floor=0.0)
    assert may_retry(Failure.CRASH, History(), 2, budget, 0.0)
    History.crashes = 2
    assert not may_retry(Failure.CRASH, History(), 2, budget, 0.0)
    assert not may_retry(Failure.NODE, History(), 2, budget, 0.0)
