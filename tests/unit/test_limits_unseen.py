"""Rates of which others may have used something unseen, just before the store was lost: no burst is admitted twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.store.budget import MINUTE, Budget
from corral.store.limits import Limits, Verdict
from corral.store.share import FRESH, TOLERATED, back_in, unseen
from corral.store.sharing import Sharing
from corral.store.valkey import Valkey

LOST = 10_000.0
AWAY = "redis://127.0.0.1:1/0"


def lost_store() -> Valkey:
    """One that was there until `LOST`."""
    store = Valkey(AWAY)
    store.connections, store.lost = 1, LOST
    return store


def sharing(count: int, asked: float = float("-inf")) -> Sharing:
    found = Sharing("gateway-1")
    found.said([f"gateway-{number}" for number in range(1, count + 1)])
    found.asked = asked
    return found


@pytest.mark.parametrize(
    ("count", "heard", "asked", "believed"),
    [
        (2, LOST - 0.5, LOST - 2.0, False),
        (2, 0.0, LOST - 2.0, False),
        (2, LOST - FRESH / 2, LOST - 2.0, True),
        (2, 0.0, LOST - FRESH / 2, True),
        (1, LOST - 0.5, LOST - 2.0, True),
    ],
    ids=["said long ago", "never said", "just said", "just asked of all", "nobody else"],
)
def test_what_others_may_have_used_is_taken_for_used(count: int, heard: float, asked: float, believed: bool) -> None:
    budget = Budget("k", 60, tpm=6000)
    budget.arrival, budget.tokens_arrival, budget.heard = LOST + 20, LOST + 10, heard
    unseen([budget], lost_store(), sharing(count, asked), LOST + 1)
    whole = LOST + MINUTE * (1 - TOLERATED)
    assert (budget.arrival, budget.tokens_arrival) == ((LOST + 20, LOST + 10) if believed else (whole, whole))
    budget.arrival = LOST + 5
    unseen([budget], lost_store(), sharing(count, asked), LOST + 30)
    assert budget.arrival == LOST + 5, "once: what is admitted from then on is counted here"


def test_more_than_that_may_be_used() -> None:
    budget = Budget("k", 60)
    budget.arrival = LOST + 59
    unseen([budget], lost_store(), sharing(2), LOST + 1)
    assert budget.arrival == LOST + 59


def test_tokens_that_are_no_more_in_the_window_are_not_declared_to_the_next_store() -> None:
    budgets = [Budget("k", tpm=6000) for _ in range(2)]
    for budget, arrival in zip(budgets, (LOST - 100, LOST - 35), strict=True):
        budget.said(arrival, 1000, 0, 0, 0, 0)
    unseen(budgets, lost_store(), sharing(2), LOST + 1)
    assert [budget.window for budget in budgets] == [0, 1000]


def test_of_a_store_that_forgot_what_was_used_up_to_then_is_unknown() -> None:
    store, known = lost_store(), sharing(2, LOST + 100)
    store.connected, known.forgot = True, LOST + 101
    budget = Budget("k", 60)
    unseen([budget], store, known, LOST + 101.5)
    assert budget.arrival == LOST + 101 + MINUTE * (1 - TOLERATED)
    assert back_in(store, known, LOST + 101.5) == 2.5, "it is told within three seconds"
    store.connected, store.due = False, LOST + 102
    assert back_in(store, known, LOST + 101.5) == 0.5, "the next try of a connection"


class Alone:
    """A gateway's limits without the store."""

    def __init__(self, count: int, name: int = 1, asked: float = LOST - 1.0) -> None:
        self.limits = Limits(lost_store(), f"gateway-{name}")
        self.limits.sharing = sharing(count, asked)
        self._asked = 0

    def ask(self, budget: Budget, now: float, tokens: int = 0) -> Verdict:
        """Ask for a request that ends at once."""
        found: list[Verdict] = []
        self._asked += 1
        self.limits.admit(budget, str(self._asked), now, found.append, tokens)
        self.limits.release(budget, str(self._asked), tokens)
        return found[0]


@given(
    limit=st.integers(2, 200),
    count=st.integers(2, 4),
    burst=st.floats(0.0, 1.0),
    before=st.floats(0.0, 1.9),
    steps=st.lists(st.tuples(st.integers(0, 3), st.floats(0.0, 3.0)), min_size=1, max_size=40),
    kind=st.sampled_from(["plain", "metered", "tenant"]),
)
def test_no_burst_before_the_loss_and_no_order_after_it_admits_a_tenth_more(
    limit: int, count: int, burst: float, before: float, steps: list[tuple[int, float]], kind: str
) -> None:
    gateways = [Alone(count, name + 1) for name in range(count)]
    tenants = [Budget("t:x", limit) if kind == "tenant" else None for _ in gateways]
    tokens = {"daily_tokens": 10**9} if kind == "metered" else {}
    budgets = [Budget("k", None if kind == "tenant" else limit, tenant=tenant, **tokens) for tenant in tenants]
    # The first one had a burst from the store, the others asked for its use before that.
    began, passed = LOST - before, int(limit * burst)
    first = budgets[0].scopes[-1]
    first.arrival, first.heard = began + passed * MINUTE / limit, began
    now = LOST
    for who, wait in steps:
        now += wait
        at = who % count
        while not gateways[at].ask(budgets[at], now, 1).refused:
            passed += 1
        assert passed <= limit * 1.1 + limit * (now - began) / MINUTE + 1e-6


@pytest.mark.parametrize(("rpm", "at_once"), [(630, 31), (70, 3), (30, 1)])
def test_a_key_that_was_idle_has_a_tenth_of_its_share_at_once(rpm: int, at_once: int) -> None:
    gateway, budget = Alone(2), Budget("k", rpm)
    assert [gateway.ask(budget, LOST).refused for _ in range(at_once + 1)] == [""] * at_once + ["rpm"]
    later = Budget("k", rpm)
    passed = sum(not gateway.ask(later, LOST + 61).refused for _ in range(rpm))
    assert rpm // 2 - 1 <= passed <= rpm // 2, "a minute later its share is whole"


@pytest.mark.parametrize("rpm", [1, 2, 6, 19])
def test_one_of_few_requests_a_minute_waits_for_no_more_than_its_refill(rpm: int) -> None:
    gateway, budget = Alone(2), Budget("k", rpm)
    refused = gateway.ask(budget, LOST)
    assert refused.refused == "rpm" and 0 < refused.retry_after <= min(MINUTE, 2 * MINUTE / rpm)
    assert gateway.ask(budget, LOST + refused.retry_after).refused == ""


@pytest.mark.parametrize("how", ["refuses", "flaps"])
def test_an_outage_has_one_beginning_however_often_the_store_is_lost(how: str) -> None:
    gateway, budget, passed = Alone(2), Budget("k", 6), 0
    store = gateway.limits.store
    assert store is not None
    for second in range(300):
        now = LOST + second
        if how == "refuses":
            store.connected = True  # its answer is an error
            unseen([budget], store, gateway.limits.sharing, now)
            store.connected = False
        else:
            store.lost = now - 0.5
        passed += not gateway.ask(budget, now).refused
    assert 13 <= passed <= 16, "three a minute"


def test_with_one_gateway_nothing_is_unseen() -> None:
    gateway, budget = Alone(1), Budget("k", 60)
    assert sum(not gateway.ask(budget, LOST).refused for _ in range(61)) == 60
