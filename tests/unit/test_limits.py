"""Limits in a real Valkey and a real Redis: exact while the store is up, whatever the order of calls."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest
from support.limits import Gateway, run, unused
from support.servers import Server

from corral.gateway.admit import refusal
from corral.store.budget import Budget, month_end, month_of


def test_tokens_are_reserved_and_the_count_takes_their_place(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        key = gateway.budget(unused(), tpm=1000, daily_tokens=5000)
        first = await gateway.ask(key, "a", 600)
        assert (first.refused, first.tokens_limit, first.tokens_remaining) == ("", 1000, 400)
        refused = await gateway.ask(key, "b", 600)
        assert (refused.refused, refused.tokens_remaining) == ("tpm", 400)
        assert 55 <= refused.retry_after <= 65
        await gateway.settle(key, "a", 100)
        again = await gateway.ask(key, "c", 600)
        assert (again.refused, again.tokens_remaining) == ("", 300)
        await gateway.settle(key, "c", 600)
        assert (await gateway.ask(key, "d", 300)).refused == ""
        assert key.day_used == 1000

    run(store, 1, work)


@pytest.mark.parametrize(("limit", "ends"), [("daily_tokens", "day"), ("monthly_tokens", "month")])
def test_a_budget_ends_with_its_day_or_month(store: Server, limit: str, ends: str) -> None:
    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        key = gateway.budget(unused(), **{limit: 1000})
        assert (await gateway.ask(key, "a", 900)).tokens_remaining == 100
        verdict = await gateway.ask(key, "b", 200)
        now = time.time()
        moment = datetime.fromtimestamp(now, UTC)
        end = (now // 86400 + 1) * 86400
        if ends == "month":
            following = moment.year * 12 + moment.month
            end = datetime(following // 12, following % 12 + 1, 1, tzinfo=UTC).timestamp()
        assert verdict.refused == limit
        assert verdict.retry_after == pytest.approx(end - now, abs=5)
        assert verdict.tokens_reset == pytest.approx(end - now, abs=5)
        assert (await gateway.ask(key, "c", 100)).refused == "", "what is left may be used"

    run(store, 1, work)


def test_the_calendar_of_the_scripts_is_the_real_one() -> None:
    for year in (1972, 2000, 2024, 2026, 2100):
        for month in range(1, 13):
            begin = datetime(year, month, 1, tzinfo=UTC).timestamp()
            following = datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC).timestamp()
            assert month_of(begin) == month_of(following - 1) == month_of(begin - 1) + 1
            assert month_end(month_of(begin)) == following


def test_days_and_months_of_the_past_count_no_more(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        key = gateway.budget(unused(), daily_tokens=1000, monthly_tokens=1000)
        assert (await gateway.ask(key, "a", 1000)).refused == ""
        script = (
            "local u = cmsgpack.unpack(redis.call('GET', KEYS[1])) u[1] = u[1] - 1 u[3] = u[3] - tonumber(ARGV[1]) "
            "redis.call('SET', KEYS[1], cmsgpack.pack(u)) return 1"
        )
        await gateway.store.request(b"EVAL", script.encode(), b"1", key.tokens, b"0")
        assert (await gateway.ask(key, "b", 10)).refused == "monthly_tokens", "the day is new, the month is not"
        await gateway.store.request(b"EVAL", script.encode(), b"1", key.tokens, b"1")
        assert (await gateway.ask(key, "c", 10)).refused == ""
        assert (key.day_used, key.month_used) == (10, 10)

    run(store, 1, work)


def test_a_minute_of_tokens_leaves_the_window_after_a_minute(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        key = gateway.budget(unused(), tpm=1000)
        assert (await gateway.ask(key, "a", 1000)).refused == ""
        # The clock is the store's own; its slices are moved into the past instead, five seconds each.
        script = (
            "local u = cmsgpack.unpack(redis.call('GET', KEYS[1])) local n = {} for i = 7, 19 do n[i] = u[i] end "
            "for i = 0, 12 do u[7 + (i - tonumber(ARGV[1])) % 13] = n[7 + i] end u[5] = u[5] - tonumber(ARGV[1]) "
            "redis.call('SET', KEYS[1], cmsgpack.pack(u)) return 1"
        )
        await gateway.store.request(b"EVAL", script.encode(), b"1", key.tokens, b"11")
        waits = await gateway.ask(key, "b", 1)
        assert waits.refused == "tpm" and waits.retry_after <= 10
        await gateway.store.request(b"EVAL", script.encode(), b"1", key.tokens, b"2")
        assert (await gateway.ask(key, "b", 1000)).refused == ""

    run(store, 1, work)


# One of six comes back in ten seconds: what the test takes until it asks for one more is less, wherever it runs.
@pytest.mark.parametrize("limits", [{"rpm": 6}, {"rpm": 6, "tpm": 10_000}])
def test_a_rate_that_is_used_up_outlives_no_clock_that_is_set_back(store: Server, limits: dict[str, int]) -> None:
    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        key = gateway.budget(unused(), **limits)
        for number in range(6):
            assert (await gateway.ask(key, f"r{number}", 1)).refused == ""
        assert (await gateway.ask(key, "more", 1)).refused == "rpm"
        # The clock is the store's own: what it knows is moved an hour into the future instead.
        script = "return redis.call('SET', KEYS[1], string.format('%.0f', redis.call('GET', KEYS[1]) + 3600000000))"
        await gateway.store.request(b"EVAL", script.encode(), b"1", key.rate)
        waits = await gateway.ask(key, "back", 1)
        assert waits.refused == "rpm" and waits.retry_after <= 11, "its minute stays used up, and no more than that"

    run(store, 1, work)


def test_tokens_that_are_used_up_outlive_no_clock_that_is_set_back(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        key = gateway.budget(unused(), tpm=1000)
        assert (await gateway.ask(key, "a", 1000)).refused == ""
        script = (
            "local u = cmsgpack.unpack(redis.call('GET', KEYS[1])) local n = {} for i = 7, 19 do n[i] = u[i] end "
            "for i = 0, 12 do u[7 + (i + 720) % 13] = n[7 + i] end u[5] = u[5] + 720 "
            "redis.call('SET', KEYS[1], cmsgpack.pack(u)) return 1"
        )
        await gateway.store.request(b"EVAL", script.encode(), b"1", key.tokens)
        waits = await gateway.ask(key, "b", 1)
        assert waits.refused == "tpm" and 50 <= waits.retry_after <= 70, "a minute, not an hour"

    run(store, 1, work)


def test_more_than_a_minute_holds_is_paid_off(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        key = gateway.budget(unused(), tpm=1000)
        assert (await gateway.ask(key, "a", 100_000)).refused == "", "a whole minute's at most is reserved"
        await gateway.settle(key, "a", 5000)
        verdict = await gateway.ask(key, "b", 1)
        assert verdict.refused == "tpm"
        assert 295 <= verdict.retry_after <= 305, "five minutes' tokens take five minutes"

    run(store, 1, work)


def test_a_repeated_call_counts_once_and_so_does_a_repeated_settlement(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        one, other = made
        name = unused()
        mine, theirs = (gateway.budget(name, rpm=6, tpm=1000, daily_tokens=10_000, concurrency=5) for gateway in made)
        for _ in range(3):
            assert (await one.ask(mine, "a", 400)).refused == ""
        assert (await other.ask(theirs, "a", 400)).refused == "", "an edge may repeat it elsewhere"
        assert (theirs.day_used, theirs.window) == (400, 400)
        verdict = await other.ask(theirs, "b", 1)
        assert verdict.remaining == 4
        for gateway, budget in ((one, mine), (other, theirs), (one, mine)):
            await gateway.settle(budget, "a", 150)
        assert (await one.ask(mine, "c", 1)).refused == ""
        assert mine.day_used == 152
        assert (await one.ask(mine, "a", 400)).refused == "", "late, and settled long since"
        assert mine.day_used == 152

    run(store, 2, work)


def test_the_longest_wait_is_told(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        key = gateway.budget(unused(), rpm=1, tpm=100, monthly_tokens=100)
        assert (await gateway.ask(key, "a", 100)).refused == ""
        verdict = await gateway.ask(key, "b", 50)
        rest = month_end(month_of(time.time())) - time.time()
        assert verdict.refused == ("monthly_tokens" if rest > 70 else verdict.refused)
        assert verdict.retry_after == pytest.approx(max(rest, 60), abs=10)

    run(store, 1, work)


@pytest.mark.parametrize("away", [False, True])
def test_what_is_told_of_a_kind_is_the_limit_that_refuses_longest(store: Server, away: bool) -> None:
    """Not the one with less left, which is whole long before the wait is over; of a tenant's as of the key's own."""

    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        tenant = Budget("t:" + unused(), rpm=30, monthly_tokens=10_000)
        key = gateway.budget(unused(), tenant, rpm=1000, tpm=1000)
        assert (await gateway.ask(key, "a", 900)).refused == ""
        assert (await gateway.ask(key, "b", 0)).refused == ""
        assert (await gateway.ask(gateway.budget(unused(), tenant), "c", 8900)).refused == ""
        if away:
            gateway.limits.store = None
        verdict = await gateway.ask(key, "d", 250)
        assert (verdict.refused, verdict.tokens_limit, verdict.limit) == ("tenant_monthly_tokens", 10_000, 30)
        assert verdict.retry_after == pytest.approx(verdict.tokens_reset, abs=1)
        other = gateway.budget(unused(), tenant, rpm=30)
        verdicts = [await gateway.ask(other, f"e{number}", 0) for number in range(30)]
        refused = next(one for one in verdicts if one.refused)
        assert (refused.refused, refused.limit, refused.remaining) == ("tenant_rpm", 30, 0)
        assert refused.retry_after == pytest.approx(refused.reset - 58, abs=1)

    run(store, 1, work)


def test_requests_without_tokens_pass_where_tokens_are_used_up(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        gateway = made[0]
        key = gateway.budget(unused(), tpm=10)
        assert (await gateway.ask(key, "a", 10)).refused == ""
        assert (await gateway.ask(key, "list", 0)).refused == ""

    run(store, 1, work)


def test_a_key_without_such_limits_is_counted_as_before() -> None:
    plain, metered = Budget("k", rpm=5, concurrency=2), Budget("k", rpm=5, concurrency=2, tpm=5)
    assert (plain.metered, plain.most, plain.ending[0]) == (False, 0, b"ZREM")
    assert (metered.metered, metered.most, metered.ending[0]) == (True, 5, b"EVALSHA")
    assert len(plain.prefix) < len(metered.prefix)


def test_the_keys_of_a_tenant_share_its_limits(store: Server) -> None:
    async def work(made: list[Gateway]) -> None:
        name = "t:" + unused()
        one, other = made
        shared = [Budget(name, rpm=10, tpm=1000, concurrency=3, daily_tokens=1500) for _ in made]
        mine = one.budget(unused(), shared[0], rpm=100, tpm=900)
        theirs = other.budget(unused(), shared[1])
        assert (await one.ask(mine, "a", 600)).refused == ""
        verdict = await other.ask(theirs, "b", 600)
        assert verdict.refused == "tenant_tpm"
        assert (verdict.tokens_limit, verdict.tokens_remaining) == (1000, 400)
        assert "1000 tokens per minute of the tenant" in refusal(verdict, theirs).message
        verdict = await one.ask(mine, "c", 350)
        assert (verdict.refused, verdict.tokens_limit) == ("tpm", 900), "its own has the least left"
        assert (await other.ask(theirs, "d", 100)).refused == ""
        assert (await other.ask(theirs, "e", 0)).refused == ""
        verdict = await other.ask(theirs, "f", 0)
        assert (verdict.refused, verdict.limit, verdict.remaining) == ("tenant_concurrency", 10, 7)
        await one.settle(mine, "a", 100)
        assert (await other.ask(theirs, "g", 0)).refused == ""
        assert (shared[1].day_used, theirs.day_used, mine.day_used) == (200, 100, 600)

    run(store, 2, work)
