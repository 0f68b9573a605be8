"""Limits while the store is away or has forgotten: known use counts on, and all is told when it is back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from support.limits import Gateway, eventually, gateways, granting, run, unused
from support.servers import STORES, Server, valkey


@pytest.fixture(scope="module", params=STORES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with valkey(tmp_path_factory.mktemp(request.param), program=request.param) as server:
        yield server


def test_a_flushed_store_is_told_what_it_last_said(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        one, other = made
        name = unused()
        mine, theirs = (gateway.budget(name, tpm=10_000, daily_tokens=1000, concurrency=2, rpm=6) for gateway in made)
        assert (await one.ask(mine, "a", 300)).refused == ""
        assert (await other.ask(theirs, "b", 300)).refused == ""
        await one.store.request(b"FLUSHALL")
        await granting(made)
        verdict = await one.ask(mine, "c", 1)
        assert verdict.refused == "concurrency", "both hold their lease still"
        assert verdict.tokens_remaining == 400
        assert verdict.remaining == 4
        await other.settle(theirs, "b", 50)
        verdict = await one.ask(mine, "d", 500)
        assert (verdict.refused, verdict.tokens_remaining) == ("", 150)
        await one.settle(mine, "a", 310)
        assert (await other.ask(theirs, "e", 0)).tokens_remaining == 140

    run(store, 2, work)


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


def test_a_limit_whose_policy_is_to_deny(store: Server) -> None:
    async def work() -> None:
        async with gateways(store.url, 1, denied=("daily_tokens",)) as made:
            gateway = made[0]
            budgeted, other = gateway.budget(unused(), daily_tokens=10), gateway.budget(unused(), tpm=10)
            gateway.store.connected = False
            assert (await gateway.ask(budgeted, "a", 1)).refused == "store"
            assert (await gateway.ask(other, "b", 1)).refused == ""

    asyncio.run(work())


def test_requests_that_were_admitted_without_the_store_count_when_it_is_back(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        plain, metered = gateway.budget(unused(), rpm=10), gateway.budget(unused(), rpm=10, tpm=1000)
        for budget in (plain, metered):
            gateway.store.connected = False
            for number in range(6):
                assert (await gateway.ask(budget, f"r{number}", 10)).refused == ""
            await gateway.settle(budget, "r0", 10)
            gateway.store.connected = True
            gateway.limits.give_back()
            assert (await gateway.ask(budget, "back", 10)).remaining == 3
            gateway.limits.give_back()
            assert (await gateway.ask(budget, "later", 10)).remaining == 2
        assert metered.window == 80, "what runs still is reserved"
        await gateway.settle(metered, "r1", 4)
        assert (await gateway.ask(metered, "end", 1)).refused == ""
        assert metered.window == 75

    run(store, 1, work)
