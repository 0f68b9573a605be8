"""What the store tells all gateways as soon as the use of a key or a tenant has grown by a part of a limit."""

from __future__ import annotations

import asyncio
from time import monotonic

import pytest
from support.limits import Gateway, eventually, run, unused
from support.servers import Server

from corral.store import share
from corral.store.budget import Budget


def _messages(gateway: Gateway) -> list[bytes]:
    heard: list[bytes] = []
    told = gateway.ears.on_message
    assert told is not None

    def listen(message: list[bytes]) -> None:
        heard.append(message[2])
        told(message)

    gateway.ears.on_message = listen
    return heard


async def _settled(gateway: Gateway) -> None:
    # What is told before this has been heard when this is.
    heard = _messages(gateway)
    await gateway.store.request(b"PUBLISH", share.CHANNEL, b"0 0 0 0 0 0 0 nobody")
    await eventually(lambda: b"0 0 0 0 0 0 0 nobody" in heard)


@pytest.mark.parametrize(
    ("limits", "requests", "tokens", "known"),
    [
        ({"rpm": 100}, 57, 0, lambda budget, now: (budget.arrival - now) * 100 / 60),
        ({"rpm": 3}, 2, 0, lambda budget, now: (budget.arrival - now) * 3 / 60),
        ({"concurrency": 30}, 20, 0, lambda budget, now: budget.others),
        ({"concurrency": 3}, 2, 0, lambda budget, now: budget.others),
        ({"concurrency": 30, "tpm": 10**9}, 20, 1, lambda budget, now: budget.others),
        ({"tpm": 10_000}, 57, 100, lambda budget, now: (budget.tokens_arrival - now) * 10_000 / 60 / 100),
        ({"daily_tokens": 10_000}, 57, 100, lambda budget, now: budget.day_used / 100),
        ({"monthly_tokens": 10_000}, 57, 100, lambda budget, now: budget.month_used / 100),
    ],
)
@pytest.mark.parametrize("whose", ["key", "tenant"])
def test_what_others_use_is_known_without_reading_it(
    store: Server, limits: dict[str, int], requests: int, tokens: int, known: object, whose: str
) -> None:
    async def work(made: list[Gateway]) -> None:
        name, tenant = unused(), f"t:{unused()} & sons"
        budgets = [
            one.budget(name, **limits) if whose == "key" else one.budget(name, tenant=Budget(tenant, **limits))
            for one in made
        ]
        one, other = made
        theirs = budgets[1].scopes[-1]
        began = monotonic()
        for number in range(requests):
            assert not (await one.ask(budgets[0], f"{name}-{number}", tokens)).refused
        await _settled(other)
        limit = next(iter(limits.values())) // max(1, tokens)
        parts = 20 if "concurrency" in limits else 40
        # A rate goes on: what has come free since is known as well.
        before, now = known(theirs, began), known(theirs, monotonic())  # type: ignore[operator]
        assert before > requests - max(1, 2 * limit / parts) - 0.2
        assert now <= requests + 0.001

    run(store, 2, work)


def test_more_than_was_reserved_is_told_when_it_is_settled(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        name = unused()
        mine, theirs = (one.budget(name, daily_tokens=10_000) for one in made)
        await made[0].ask(mine, "a", 10)
        await made[0].settle(mine, "a", 4321)
        await _settled(made[1])
        assert theirs.day_used == 4321

    run(store, 2, work)


def test_what_comes_and_goes_is_told_so_often_at_most(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        for at_once, tokens, most, a_second in ((1, 0, 0, 0), (2, 0, 4, 2), (1, 500, 20, 10)):
            name, limits = unused(), {"daily_tokens": 10_000} if tokens else {}
            mine = made[0].budget(name, concurrency=8, **limits)
            heard, began = _messages(made[1]), monotonic()
            for number in range(100):
                names = [f"{name}-{number}-{at}" for at in range(at_once)]
                for each in names:
                    assert not (await made[0].ask(mine, each, tokens)).refused
                for each in names:
                    await made[0].settle(mine, each)
            await _settled(made[1])
            assert most <= len(heard) - 1 <= most + a_second * (monotonic() - began)

    run(store, 2, work)


def test_a_clock_of_the_store_that_was_set_back_silences_nothing(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        mine = made[0].budget(unused(), concurrency=4)
        theirs = made[1].budget(mine.key_id, concurrency=4)
        seconds, _ = await made[0].store.request(b"TIME")
        key = b"corral:1:told:leases:" + mine.key_id.encode()
        await made[0].store.request(b"SET", key, b"%d 4" % ((int(seconds) + 3600) * 1_000_000))
        for number in range(4):
            await made[0].ask(mine, f"r{number}")
        await _settled(made[1])
        assert theirs.others == 4

    run(store, 2, work)


def test_what_was_spent_without_the_store_is_not_given_back_by_what_it_tells(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        name = unused()
        mine, theirs = (one.budget(name, rpm=100) for one in made)
        made[0].store.connected = False  # its other connection is there
        admitted, began = 0, monotonic()
        for number in range(4):
            for at in range(100):
                admitted += not (await made[0].ask(mine, f"{number}-{at}")).refused
            said = mine.said_arrival
            for at in range(5):
                await made[1].ask(theirs, f"other-{number}-{at}")
            await eventually(lambda said=said: mine.said_arrival > said)  # type: ignore[misc]
        assert 50 <= admitted <= 50 + 50 * (monotonic() - began) / 60, "its share, and what comes free of it meanwhile"

    run(store, 2, work)


def test_requests_that_are_on_their_way_are_no_others(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        name = unused()
        mine = made[0].budget(name, concurrency=40, tpm=10**6)
        said: list[int] = []

        def told(message: list[bytes]) -> None:
            share.told(made[0].limits.sharing, made[0].limits.find, message[2], monotonic())
            said.append(mine.others)

        made[0].ears.on_message = told
        for number in range(30):
            asked = [asyncio.create_task(made[0].ask(mine, f"{number}-{at}", 10)) for at in range(8)]
            await asyncio.sleep(0)
            # What the store has counted of them by now, before it has answered.
            share.told(made[0].limits.sharing, made[0].limits.find, b"0 8 0 0 0 0 0 %b" % name.encode(), monotonic())
            said.append(mine.others)
            await asyncio.gather(*asked)
            for at in range(8):
                made[0].limits.release(mine, f"{number}-{at}", 10)
            share.told(made[0].limits.sharing, made[0].limits.find, b"0 8 0 0 0 0 0 %b" % name.encode(), monotonic())
            said.append(mine.others)
            await made[0].store.request(b"PING")
        assert not any(said) and mine.unanswered == 0 and len(said) > 60

    run(store, 1, work)


def test_calls_that_nobody_answers_are_not_on_their_way_for_ever(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        for limits in ({"concurrency": 9}, {"concurrency": 9, "tpm": 1000}):
            mine = made[0].budget(unused(), **limits)
            await made[0].ask(mine, "a", 1)
            asked = asyncio.create_task(made[0].ask(mine, "b", 1))
            made[0].limits.release(mine, "a", 1)
            await asyncio.sleep(0)
            assert mine.unanswered == 2
            made[0].store.lose()
            await asked
            assert mine.unanswered == 0
            await eventually(lambda: made[0].store.connected)

    run(store, 1, work)


@pytest.mark.parametrize("limits", [{"daily_tokens": 12_000}, {"tpm": 12_000}, {"concurrency": 40}])
def test_what_comes_and_goes_hides_nothing_that_grows(store: Server, limits: dict[str, int]) -> None:
    async def work(made: list[Gateway]) -> None:
        name = unused()
        mine, theirs = (one.budget(name, **({"concurrency": 4, "tpm": 10**6} | limits)) for one in made)
        at_once = mine.concurrency or 0
        for number in range(100):
            names = [f"r{number}-{at}" for at in range(at_once // 2)]
            await asyncio.gather(*(made[0].ask(mine, each, 1) for each in names))
            for each in names:
                await made[0].settle(mine, each, 1)
        for at in range(at_once - 1):
            await made[0].ask(mine, f"last-{at}", 9000 // at_once)
        await _settled(made[1])
        assert theirs.others >= (at_once - 1) * 0.9
        if at_once == 4:
            assert max(theirs.day_used, theirs.window) >= 6750

    run(store, 2, work)


def test_less_than_is_known_and_a_key_that_nobody_has_say_nothing(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        mine = made[0].budget(unused(), concurrency=9, rpm=60, daily_tokens=1000)
        await made[0].ask(mine, "a", 500)
        mine.others = 4
        known = mine.arrival, mine.day_used, mine.others
        for name in (mine.key_id.encode(), b"nobody has this"):
            message = b"1 2 3 %d 4 5 6 %b" % (mine.day, name)
            share.told(made[0].limits.sharing, made[0].limits.find, message, mine.arrival - 30)
        assert (mine.arrival, mine.day_used, mine.others) == known

    run(store, 1, work)


def test_a_request_that_is_asked_again_is_not_told_again(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        heard = _messages(made[0])
        for limits in ({"rpm": 3, "concurrency": 5}, {"rpm": 3, "tpm": 100}):
            mine = made[0].budget(unused(), **limits)
            for _ in range(3):
                await made[0].ask(mine, "same", 50)
        await _settled(made[0])
        assert len(heard) == 3

    run(store, 1, work)
