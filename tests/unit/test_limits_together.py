"""Many calls of many gateways at once, in a real Valkey and a real Redis: exact, whatever comes between what."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.limits import PROPERTY, Gateway, run, unused
from support.servers import Server

from corral.store.budget import DAY, MINUTE, Budget

ROUND = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from(["ask", "ask", "settle", "again"]), st.integers(0, 9), st.integers(1, 400)
    ),
    min_size=1,
    max_size=12,
)
"""Calls that are under way together: by which gateway, what, of which request, tokens."""
SLACK = 5.0


class Asked:
    """What a key's requests at three gateways came to. ``used`` are tokens of those that ended, ``running`` has the
    others: whose they are, and what is reserved for them."""

    def __init__(self, made: list[Gateway], budgets: list[Budget]) -> None:
        self._made, self._budgets = made, budgets
        self.running: dict[str, tuple[int, int]] = {}
        self.used = self.passed = 0
        self._number = 0

    async def together(self, calls: list[tuple[int, str, int, int]]) -> None:
        """All calls of a round. None is of a request that another one of them ends."""
        free, works = list(self.running), []
        for who, what, which, tokens in calls:
            if what == "ask" or not free:
                self._number += 1
                works.append(self._ask(who, f"{self._budgets[0].key_id}-{self._number}", tokens))
            else:
                request = free.pop(which % len(free))
                works.append(self._again(request, tokens) if what == "again" else self._settle(request, tokens))
        await asyncio.gather(*works)

    @property
    def held(self) -> int:
        return self.used + sum(reserved for _, reserved in self.running.values())

    async def _ask(self, who: int, request: str, tokens: int) -> None:
        budget = self._budgets[who]
        if not (await self._made[who].ask(budget, request, tokens)).refused:
            self.passed += 1
            self.running[request] = who, min(tokens, budget.most)

    async def _settle(self, request: str, tokens: int) -> None:
        # Less than was reserved: what is counted is what is used.
        who, reserved = self.running.pop(request)
        self.used += tokens * reserved // 400
        await self._made[who].settle(self._budgets[who], request, tokens * reserved // 400)

    async def _again(self, request: str, tokens: int) -> None:
        who, reserved = self.running[request]
        budget = self._budgets[who]
        verdict = await self._made[who].ask(budget, request, tokens)
        if budget.metered or budget.concurrency:
            assert verdict.refused == "", "the store knows it: it counts once"
        if not verdict.refused:
            budget.in_flight[request] = reserved


@PROPERTY
@given(
    rpm=st.integers(1, 40) | st.none(),
    tpm=st.integers(1, 2000) | st.none(),
    daily=st.integers(1, 4000) | st.none(),
    concurrency=st.integers(1, 10) | st.none(),
    rounds=st.lists(ROUND, max_size=12),
)
def test_no_interleaving_admits_more_than_the_limits(
    store: Server,
    rpm: int | None,
    tpm: int | None,
    daily: int | None,
    concurrency: int | None,
    rounds: list[list[tuple[int, str, int, int]]],
) -> None:
    """Three gateways ask, settle and repeat, all calls of a round at once."""

    async def work(made: list[Gateway]) -> None:
        limits = {"rpm": rpm, "tpm": tpm, "daily_tokens": daily, "concurrency": concurrency}
        name = unused()
        budgets = [gateway.budget(name, **{k: v for k, v in limits.items() if v}) for gateway in made]
        began, day = time.monotonic(), time.time() // DAY
        asked = Asked(made, budgets)

        def is_one_minute() -> bool:
            """Whether all was in one minute and day: what was used before counts no more in the next."""
            return time.monotonic() - began < MINUTE - SLACK and time.time() // DAY == day

        for calls in rounds:
            await asked.together(calls)
            if is_one_minute():
                assert asked.held <= min(tpm or asked.held, daily or asked.held), "tokens"
            assert asked.passed <= (rpm or asked.passed) + (time.monotonic() - began) * (rpm or 0) / 60 + 1e-6
            assert len(asked.running) <= (concurrency or len(asked.running))
        if (tpm or daily) and is_one_minute():
            # Nothing is lost either: what is left is admitted to the last token.
            left = min(limit - asked.held for limit in (tpm, daily) if limit)
            free = (not concurrency or len(asked.running) < concurrency) and (not rpm or asked.passed < rpm)
            if 0 < left <= budgets[0].most and free:
                assert (await made[0].ask(budgets[0], f"{name}-last", left)).refused == ""

    run(store, 3, work)


@PROPERTY
@given(
    calls=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(1, 300)), max_size=40),
    tpm=st.integers(100, 2000),
    rpm=st.integers(1, 30),
)
def test_no_interleaving_of_a_tenants_keys_admits_more(
    store: Server, calls: list[tuple[int, int, int]], tpm: int, rpm: int
) -> None:
    async def work(made: list[Gateway]) -> None:
        name = "t:" + unused()
        keys = [unused(), unused(), unused()]
        shared = [Budget(name, rpm=rpm, tpm=tpm) for _ in made]
        budgets = [[gateway.budget(key, tenant) for key in keys] for gateway, tenant in zip(made, shared, strict=True)]
        began = time.monotonic()
        asked = [made[at].ask(budgets[at][key], f"r{number}", tokens) for number, (at, key, tokens) in enumerate(calls)]
        verdicts = await asyncio.gather(*asked)
        passed = [
            min(tokens, tpm) for (_, _, tokens), verdict in zip(calls, verdicts, strict=True) if not verdict.refused
        ]
        assert sum(passed) <= tpm
        assert len(passed) <= rpm + (time.monotonic() - began) * rpm / 60
        assert passed or not calls

    run(store, 2, work)


@pytest.mark.parametrize(
    ("whose", "limits"),
    [
        *(("key", limits) for limits in ({"tpm": 5000}, {"daily_tokens": 5000, "rpm": 1000}, {"monthly_tokens": 5000})),
        *((whose, limits) for whose in ("key", "tenant") for limits in ({"rpm": 500}, {"concurrency": 500})),
        ("tenant", {"tpm": 5000}),
    ],
)
def test_twenty_gateways_at_once_admit_exactly_the_limit(store: Server, whose: str, limits: dict[str, int]) -> None:
    async def work(made: list[Gateway]) -> None:
        name = unused()
        if whose == "key":
            budgets = [gateway.budget(name, **limits) for gateway in made]
        else:
            budgets = [gateway.budget(name, Budget("t:" + name, **limits)) for gateway in made]  # type: ignore[arg-type]
        began = time.monotonic()
        asked = [
            gateway.ask(budget, f"{name}-{at}-{number}", 10)
            for number in range(50)
            for at, (gateway, budget) in enumerate(zip(made, budgets, strict=True))
        ]
        admitted = sum(not verdict.refused for verdict in await asyncio.gather(*asked))
        if limits == {"rpm": 500}:
            assert 500 <= admitted <= 500 + 500 * (time.monotonic() - began) / 60
            return
        assert admitted == 500
        ends: list[Awaitable[None]] = [
            gateway.settle(budget, request, 4)
            for gateway, budget in zip(made, budgets, strict=True)
            for request in list(budget.in_flight)
        ]
        await asyncio.gather(*ends)
        assert (await made[0].ask(budgets[0], f"{name}-end", 1)).refused == ""
        if budgets[0].metered:
            reserved = min(1, budgets[0].most)  # by the last one: nothing where no limit is one of tokens
            assert budgets[0].month_used == 2000 + reserved, "each was settled once, with its count"

    run(store, 20, work)
