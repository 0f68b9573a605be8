"""What gateways tell each other of the long prompts that runners read for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from time import monotonic

import pytest
from support.limits import eventually
from support.servers import Server

from corral.fleet.hanging import APART, SILENCE, Runner
from corral.store import reading
from corral.store.lua import PREFIX
from corral.store.reading import LASTS, Reading
from corral.store.valkey import Valkey

HERE, THERE = ("node-1", "sim:latest"), ("node 2", "hf.co/a b:Q4")


def test_what_is_said_is_heard_with_the_time_that_has_passed() -> None:
    one, other = Reading(), Reading()
    one.own = {HERE: (37.5, 98.0), THERE: (9.0, 0.0)}
    other.heard([(0.5, one.said(100.0))], 200.0)
    assert other.others(200.0) == {HERE: (37.5, pytest.approx(197.5)), THERE: (9.0, 0.0)}
    assert other.others(200.0 + LASTS + 0.1) == {}, "a word that nobody says again"


def test_of_several_gateways_the_longest_and_the_latest_counts() -> None:
    found = Reading()
    found.heard([(0.0, b"node-1 sim%3Alatest 10 4"), (1.0, b"node-1 sim%3Alatest 30 9")], 100.0)
    assert found.others(100.0) == {HERE: (30.0, 96.0)}


@pytest.mark.parametrize("word", [b"", b"a b c d", b"a b 1", b"a b nan 1", b"a b 1 inf", b"\xff\xfe", b"a b 1 2 3"])
def test_a_word_that_is_none_says_nothing(word: bytes) -> None:
    found = Reading()
    found.heard([(0.0, word + b"\nnode-1 sim%3Alatest 10 -1")], 100.0)
    assert found.others(100.0) == {HERE: (10.0, 0.0)}


def hangs(runner: Runner, until: float, beside: Callable[[float], tuple[float, float]] | None = None) -> float | None:
    """When a runner hangs that has a short stream from 100.0 on; None: not before `until`."""
    now = 100.0
    while now < until:
        now += 0.5
        runner.works(99.0, SILENCE)
        if beside is not None:
            runner.beside(*beside(now))
        if runner.look(now):
            return now
    return None


def test_what_another_gateway_has_read_there_is_no_silence_of_the_runner() -> None:
    assert hangs(Runner(*HERE, 100.0), 200.0) == pytest.approx(105.5)
    assert hangs(Runner(*HERE, 100.0), 130.0, lambda now: (37.5, 0.0)) is None
    hung = hangs(Runner(*HERE, 100.0), 200.0, lambda now: (37.5, 0.0))
    assert hung is not None and hung == pytest.approx(138.0), "but no longer than that may take"
    gives = hangs(Runner(*HERE, 100.0), 300.0, lambda now: (37.5, now - (now % 20)))
    assert gives is None, "each token that the other gets is one"


def test_the_same_token_told_again_is_no_other_one() -> None:
    jitter = iter([0.0, 0.1, -0.1, 0.2, 0.05] * 100)
    runner = Runner(*HERE, 100.0)
    hung = hangs(runner, 300.0, lambda now: (20.0, 99.9 + next(jitter) * APART))
    assert hung is not None and hung < 125.0


def test_a_runner_of_which_another_gateway_has_had_no_long_prompts_has_its_usual_time() -> None:
    runner = Runner(*HERE, 100.0)
    assert hangs(runner, 110.0, lambda now: (37.5, 0.0)) is None
    hung = hangs(runner, 200.0)
    assert hung is not None and hung <= 100.0 + 10.0 + 2 * SILENCE + 1.0


def run(store: Server, work: Callable[[list[tuple[Reading, Valkey, str]]], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        made = [(Reading(), Valkey(store.url, scripts=(reading.TEXT,), timeout=5.0), f"gateway-{at}") for at in (1, 2)]
        tasks = [asyncio.create_task(one.run()) for _, one, _ in made]
        try:
            async with asyncio.timeout(30):
                while not all(one.connected for _, one, _ in made):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await made[0][1].request(b"DEL", PREFIX + b"reading")
            await work(made)
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    asyncio.run(all_of_it())


async def once(reader: Reading, store: Valkey, name: str) -> None:
    """A turn of `reading.keep`."""
    heard = reader._heard
    async with keeping((reader, store, name)):
        await eventually(lambda: reader._heard != heard)


@asynccontextmanager
async def keeping(*made: tuple[Reading, Valkey, str]) -> AsyncIterator[None]:
    """Gateways tell and hear, all the time: a word that is not said again is over."""
    tasks = [asyncio.create_task(reading.keep(*one)) for one in made]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def test_gateways_hear_of_each_other_by_the_store(store: Server) -> None:
    async def work(made: list[tuple[Reading, Valkey, str]]) -> None:
        (one, store, _), (other, _, _) = made
        began = monotonic()
        one.own = {HERE: (30.0, began - 3.0)}
        heard: dict[tuple[str, str], tuple[float, float]] = {}

        def hears() -> bool:
            heard.update(other.others(monotonic()))
            return bool(heard)

        async with keeping(*made):
            await eventually(hears)
            need, token = heard[HERE]
            # It may be wrong by what the word took, but by no more.
            assert need == 30.0 and abs(token - (began - 3.0)) <= monotonic() - began
            assert one.others(monotonic()) == {}, "its own is not told to it"
            one.own = {}
            await eventually(lambda: not other.others(monotonic()))
        # A gateway that ended, or a clock that was set back.
        for ago in (LASTS + 1.0, -3600.0):
            seconds, _ = await store.request(b"TIME")
            word = b"%d node-1 m 9 -1" % ((int(seconds) - ago) * 1e6)
            await store.request(b"HSET", PREFIX + b"reading", b"gateway-3", word)
            await once(*made[1])
            assert other.others(monotonic()) == {}
            assert not await store.request(b"HEXISTS", PREFIX + b"reading", b"gateway-3")

    run(store, work)


def test_a_store_that_is_of_another_kind_leaves_each_to_its_own(
    store: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(made: list[tuple[Reading, Valkey, str]]) -> None:
        one, valkey, _ = made[0]
        await valkey.request(b"SET", PREFIX + b"reading", b"no hash")
        async with keeping(*made[:1]):
            await eventually(lambda: caplog.text.count("what others read is not known") >= 2)
            assert one.others(monotonic()) == {}
            await valkey.request(b"DEL", PREFIX + b"reading")
            known = one._heard
            await eventually(lambda: one._heard != known)

    run(store, work)
