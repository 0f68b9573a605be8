"""Limits while the store is away or has forgotten: known use counts on, and all is told when it is back."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.limits import PROPERTY, Gateway, eventually, granting, run, unused
from support.servers import Server

from corral.store import leases
from corral.store.budget import ACTIVE, EPOCH, GRANTS, Budget
from corral.store.share import at_once


def test_a_flushed_store_is_told_what_it_last_said(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        one, other = made
        name, began = unused(), time.monotonic()
        mine, theirs = (gateway.budget(name, tpm=10_000, daily_tokens=1000, concurrency=2, rpm=6) for gateway in made)
        assert (await one.ask(mine, "a", 300)).refused == ""
        assert (await other.ask(theirs, "b", 300)).refused == ""
        await one.store.request(b"FLUSHALL")
        await granting(made)
        verdict = await one.ask(mine, "c", 1)
        assert verdict.refused == "concurrency", "both hold their lease still"
        assert verdict.tokens_remaining == 400
        assert 4 <= verdict.remaining <= 4 + 6 * (time.monotonic() - began) / 60
        await other.settle(theirs, "b", 50)
        verdict = await one.ask(mine, "d", 500)
        assert (verdict.refused, verdict.tokens_remaining) == ("", 150)
        await one.settle(mine, "a", 310)
        assert (await other.ask(theirs, "e", 0)).tokens_remaining == 140

    run(store, 2, work)


def test_a_store_that_is_flushed_while_it_is_read_is_told_and_not_believed(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        (one,) = made
        mine = one.budget(unused(), daily_tokens=1000)
        assert (await one.ask(mine, "a", 300)).refused == ""
        known = await known_now(one)
        known.held = [mine.key_id]
        await one.store.request(b"FLUSHALL")
        with pytest.raises(leases._Forgotten):
            await leases._read_use(one.limits, one.store, known)
        assert mine.day_used == 300
        with pytest.raises(leases._Forgotten):
            await leases._present(one.limits, one.store, known)
        await granting(made)
        assert (await one.ask(mine, "b", 0)).tokens_remaining == 700

    run(store, 1, work)


@pytest.mark.parametrize("count", [1, 2])
def test_a_store_that_is_flushed_again_and_again_while_it_is_told_knows_in_the_end(store: Server, count: int) -> None:
    async def work(made: list[Gateway]) -> None:
        draw, name = random.Random(count), unused()
        budgets = [gateway.budget(name, daily_tokens=1000) for gateway in made]
        for number, (gateway, budget) in enumerate(zip(made, budgets, strict=True)):
            assert (await gateway.ask(budget, f"r{number}", 100)).refused == ""
        for _ in range(60):
            await made[0].store.request(b"FLUSHALL")
            made[draw.randrange(count)].limits.on_lost()
            await asyncio.sleep(draw.random() * 0.004)
        await granting(made)
        assert [budget.day_used for budget in budgets][-1] == 100 * count
        assert (await made[0].ask(budgets[0], "last", 0)).tokens_remaining == 1000 - 100 * count

    run(store, count, work)


def test_a_step_of_a_rebuild_is_of_the_store_that_was_told(store: Server) -> None:
    """One that was flushed between what it was told and the end of the step begins anew."""

    async def work(made: list[Gateway]) -> None:
        for named, key in ((leases.ROUND, EPOCH), (EPOCH, GRANTS)):
            await made[0].store.request(b"FLUSHALL")
            keys = (key, key + b"-told", key + b"-of", named)
            arguments = (b"gateway-1", b"1", b"0", b"of another", b"0")
            assert await made[0].store.request(b"EVALSHA", leases._REBUILD, b"4", *keys, *arguments) == -1

    run(store, 1, work)


def test_a_gateway_that_never_saw_a_key_knows_what_others_used(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        one, other = made
        name = unused()
        mine, theirs = (gateway.budget(name, daily_tokens=1000) for gateway in made)
        assert (await one.ask(mine, "a", 900)).refused == ""
        await eventually(lambda: theirs.day_used == 900)
        other.store.connected = False
        assert (await other.ask(theirs, "b", 50)).refused == ""
        assert (await other.ask(theirs, "c", 1)).refused == "daily_tokens", "its share of what is left"

    run(store, 2, work)


def test_what_was_admitted_without_the_store_is_counted_when_it_is_back(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        key = gateway.budget(unused(), tpm=1000, daily_tokens=10_000)
        gateway.store.connected = False
        assert (await gateway.ask(key, "a", 600)).tokens_remaining == 400
        assert (await gateway.ask(key, "b", 600)).refused == "tpm"
        await gateway.settle(key, "a", 250)
        assert gateway.limits.local == 1
        gateway.store.connected = True
        gateway.limits.give_back()
        gateway.limits.give_back()
        verdict = await gateway.ask(key, "c", 100)
        assert (verdict.refused, key.day_used, verdict.tokens_remaining) == ("", 350, 650)
        assert not gateway.limits.owed

    run(store, 1, work)


def test_a_long_outage_forgets_no_token(store: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral.store.limits.OWED_MAX", 3)

    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        key = gateway.budget(unused(), daily_tokens=10_000)
        gateway.store.connected = False
        for number in range(10):
            assert (await gateway.ask(key, f"r{number}", 10)).refused == ""
            await gateway.settle(key, f"r{number}", 7)
        gateway.store.connected = True
        for _ in range(3):
            gateway.limits.give_back()
        await gateway.ask(key, "last", 1)
        assert key.day_used == 71

    run(store, 1, work)


def test_requests_that_were_admitted_without_the_store_count_when_it_is_back(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        plain, metered = gateway.budget(unused(), rpm=10), gateway.budget(unused(), rpm=10, tpm=1000)
        for budget in (plain, metered):
            began = time.monotonic()
            gateway.store.connected = False
            for number in range(6):
                assert (await gateway.ask(budget, f"r{number}", 10)).refused == ""
            await gateway.settle(budget, "r0", 10)
            gateway.store.connected = True
            gateway.limits.give_back()
            back = (await gateway.ask(budget, "back", 10)).remaining
            gateway.limits.give_back()
            later = (await gateway.ask(budget, "later", 10)).remaining
            free = 10 * (time.monotonic() - began) / 60
            assert 3 <= back <= 3 + free and 2 <= later <= 2 + free
        assert metered.window == 80, "what runs still is reserved"
        await gateway.settle(metered, "r1", 4)
        assert (await gateway.ask(metered, "end", 1)).refused == ""
        assert metered.window == 75

    run(store, 1, work)


# -- the shares of all gateways together


async def in_turn(made: list[Gateway], budgets: list[Budget], count: int, prefix: str) -> list[int]:
    """Each gateway is asked so often; how many each admitted."""
    found = [0] * len(made)
    for number in range(count):
        for at, (gateway, budget) in enumerate(zip(made, budgets, strict=True)):
            verdict = await gateway.ask(budget, f"{budget.key_id}-{prefix}-{at}-{number}", 1)
            found[at] += not verdict.refused
    return found


async def known_now(gateway: Gateway) -> leases._Known:
    """What a gateway knows of a store that grants."""
    known = leases._Known()
    known.epoch = await gateway.store.request(b"GET", EPOCH)
    return known


async def read_and_lose(made: list[Gateway]) -> None:
    """Each gateway has just asked what the others use, as it does each two seconds, when the store is lost."""
    for gateway in made:
        await leases._read_use(gateway.limits, gateway.store, await known_now(gateway))
    for gateway in made:
        gateway.store.connected = False


KINDS = pytest.mark.parametrize("kind", ["plain", "metered", "tenant"])


def keys(made: list[Gateway], kind: str, **limits: int) -> list[Budget]:
    name = unused()
    if kind == "tenant":
        return [gateway.budget(name, Budget("t:" + name, **limits)) for gateway in made]  # type: ignore[arg-type]
    more = {"daily_tokens": 10**9} if kind == "metered" else {}
    return [gateway.budget(name, **limits, **more) for gateway in made]


@KINDS
def test_what_one_gateway_runs_is_nobody_elses_share(store: Server, kind: str) -> None:
    async def work(made: list[Gateway]) -> None:
        budgets = keys(made, kind, concurrency=30)
        for number in range(30):
            assert (await made[1].ask(budgets[1], f"r{number}", 1)).refused == ""
        whose = [budget.tenant or budget for budget in budgets]
        await eventually(lambda: [scope.others for scope in whose] == [30, 0, 30])
        await read_and_lose(made)
        for number in range(12):
            await made[1].settle(budgets[1], f"r{number}", 1)
        assert await in_turn(made, budgets, 15, "during") == [0, 12, 0], "what ends there is its own again"

    run(store, 3, work)


@KINDS
def test_a_minute_that_was_used_elsewhere_is_nobody_elses_share(store: Server, kind: str) -> None:
    async def work(made: list[Gateway]) -> None:
        budgets, began = keys(made, kind, rpm=30), time.monotonic()
        for number in range(24):
            assert (await made[1].ask(budgets[1], f"r{number}", 1)).refused == ""
        whose = [budget.tenant or budget for budget in budgets]
        await eventually(lambda: all(scope.arrival for scope in whose))
        await read_and_lose(made)
        found = await in_turn(made, budgets, 10, "during")
        most = 2 + 10 * (time.monotonic() - began) / 60
        assert max(found) <= most and sum(found) >= 3, "what is left of it, and what comes free meanwhile"

    run(store, 3, work)


def test_others_requests_are_known_until_they_end(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        one, other = made
        name = unused()
        mine, theirs = (gateway.budget(name, concurrency=4) for gateway in made)
        assert (await one.ask(mine, "a")).refused == ""
        await eventually(lambda: theirs.others == 1)
        await one.settle(mine, "a")
        await one.store.request(b"ZREM", ACTIVE, name.encode())  # its last request began long ago
        await eventually(lambda: theirs.others == 0)
        mine = one.budget(name + "-long", concurrency=4)
        assert (await one.ask(mine, "b")).refused == ""
        await one.store.request(b"ZREM", ACTIVE, mine.key_id.encode())
        theirs = other.budget(mine.key_id, concurrency=4)  # of a gateway that starts when it has run for long
        await eventually(lambda: theirs.others == 1)

    run(store, 2, work)


def test_what_ended_since_the_store_was_asked_may_run_elsewhere_by_now(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        budgets = keys(made, "plain", concurrency=30)
        assert await in_turn(made, budgets, 10, "before") == [10, 10, 10]
        # What ran when it was lost the last time says nothing.
        await read_and_lose(made)
        assert await in_turn(made, budgets, 1, "lost") == [0, 0, 0]
        for gateway in made:
            gateway.store.connected = True
        await eventually(lambda: all(gateway.limits._kept is None for gateway in made))
        for gateway in made:
            await leases._read_use(gateway.limits, gateway.store, await known_now(gateway))
        for request in list(budgets[0].in_flight):
            await made[0].settle(budgets[0], request)
        assert sum(await in_turn(made[1:2], budgets[1:2], 10, "then")) == 10
        for gateway in made:
            gateway.store.connected = False
        await in_turn(made, budgets, 10, "during")
        first, *others = (len(budget.in_flight) for budget in budgets)
        assert others == [20, 10] and first <= 3, "a tenth at most is not known yet"

    run(store, 3, work)


@pytest.mark.parametrize("kind", ["plain", "tenant"])
def test_what_was_admitted_without_the_store_is_known_to_others(store: Server, kind: str) -> None:
    async def work(made: list[Gateway]) -> None:
        one, other = made
        mine, theirs = keys(made, kind, rpm=2)

        def used() -> bool:
            return (theirs.tenant or theirs).arrival > time.monotonic() + 10

        one.store.connected = False
        assert (await one.ask(mine, "a", 1)).refused == ""
        await one.settle(mine, "a")
        one.store.connected = True
        one.limits.give_back()
        await eventually(used)
        assert (await one.ask(mine, "b", 1)).refused == ""
        await one.store.request(b"FLUSHALL")
        theirs = Budget(theirs.key_id, theirs.rpm, tenant=theirs.tenant and Budget(theirs.tenant.key_id, rpm=2))
        for scope in theirs.scopes:
            other.budgets[scope.key_id] = scope
        await granting(made)
        await eventually(used)

    run(store, 2, work)


@pytest.mark.parametrize("kind", ["plain", "metered", "tenant"])
@pytest.mark.parametrize("limit", ["rpm", "tpm", "concurrency"])
def test_one_that_starts_again_without_the_store_has_its_share_and_no_new_minute(
    store: Server, kind: str, limit: str
) -> None:
    """Killed when it had admitted its share; by the names that control or its own file has."""

    async def work(made: list[Gateway]) -> None:
        one, killed = made
        budgets = keys(made, kind, **{limit: 40})
        for gateway in made:
            gateway.store.connected = False
        began = time.monotonic()
        passed = await in_turn(made, budgets, 40, "before")
        assert min(passed) >= 20
        again = Gateway(store.url, killed.limits.gateway.decode())
        again.limits.sharing.heard(["gateway-1"])
        theirs = keys([again], kind, **{limit: 40})
        found = await in_turn([one, again], [budgets[0], *theirs], 40, "then")
        if limit == "concurrency":
            assert found == [0, 20], "what ran there has ended with it"
        else:
            assert sum(passed) + sum(found) <= 40 * 1.1 + 40 * (time.monotonic() - began) / 60
            again.limits.sharing.began -= 60
            fresh = keys([again], kind, **{limit: 40})
            (later,) = await in_turn([again], fresh, 40, "later")
            assert 20 <= later <= 20 + 20 * (time.monotonic() - began) / 60, "a minute later its share is whole"

    run(store, 2, work)


def test_a_limit_that_gateways_do_not_divide(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        ten, two, ten_a_minute, two_a_minute = (
            keys(made, "plain", **limits)
            for limits in ({"concurrency": 10}, {"concurrency": 2}, {"rpm": 10}, {"rpm": 2})
        )
        for gateway in made:
            gateway.store.connected = False
        assert await in_turn(made, ten, 12, "r") == [4, 3, 3]
        assert await in_turn(made, two, 12, "r") == [1, 1, 1], "the one exception: fewer than there are gateways"
        assert await in_turn(made, ten_a_minute, 12, "r") == [3, 3, 3]
        assert await in_turn(made, two_a_minute, 12, "r") == [1, 1, 1]

    run(store, 3, work)


@PROPERTY
@given(
    limit=st.integers(3, 60),
    split=st.tuples(*[st.integers(0, 60)] * 3),
    ends=st.tuples(*[st.integers(0, 60)] * 3),
    kind=st.sampled_from(["plain", "metered", "tenant"]),
)
def test_no_split_of_what_was_used_admits_more_without_the_store(
    store: Server, limit: int, split: tuple[int, ...], ends: tuple[int, ...], kind: str
) -> None:
    async def work(made: list[Gateway]) -> None:
        at_a_time, a_minute = keys(made, kind, concurrency=limit), keys(made, kind, rpm=limit)
        began, asked = time.monotonic(), 0
        for at, (gateway, one, other) in enumerate(zip(made, at_a_time, a_minute, strict=True)):
            for number in range(split[at]):
                await gateway.ask(one, f"{one.key_id}-{at}-{number}", 1)
                asked += not (await gateway.ask(other, f"{other.key_id}-{at}-{number}", 1)).refused
        before = [len(budget.in_flight) for budget in at_a_time]
        assert sum(before) == min(limit, sum(split))
        await read_and_lose(made)
        for gateway, budget, count in zip(made, at_a_time, ends, strict=True):
            for request in list(budget.in_flight)[:count]:
                await gateway.settle(budget, request, 1)
        await in_turn(made, at_a_time, limit + 1, "during")
        assert sum(len(budget.in_flight) for budget in at_a_time) == limit, "no more, and no less"
        asked += sum(await in_turn(made, a_minute, limit + 1, "during"))
        assert asked <= limit + limit * (time.monotonic() - began) / 60 + 1e-6

    run(store, 3, work)


@given(st.integers(1, 50), st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_shares_are_the_limit_together(limit: int, own: list[int]) -> None:
    names = [f"gateway-{number}" for number in range(len(own))]
    shares = [at_once(limit, some, sum(own) - some, name, names[::-1]) for name, some in zip(names, own, strict=True)]
    assert sum(shares) == max(limit, sum(own)) if limit >= len(own) else sum(shares) <= max(len(own), sum(own))
