"""What happens after a failed attempt."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from corral.fleet.choose import choose
from corral.fleet.node import Node
from corral.gateway.recover import (
    ATTEMPTS_MAX,
    BUDGET_CAP,
    BUDGET_FLOOR,
    BUDGET_SHARE,
    LOST,
    LOST_MAX,
    SHUN,
    Failure,
    RetryBudget,
    classify,
    count,
    final_error,
    holds,
    may_retry,
    shun,
)
from corral.wire.errors import ApiError


@dataclass
class History:
    """What the request went through."""

    attempts: int = 0
    orphaned: int = 0
    crashes: int = 0
    lost: int = 0
    connects: int = 0
    held_until: float = 0.0


@pytest.mark.parametrize(
    ("status", "proxied", "message", "expected"),
    [
        (503, True, "", Failure.CONNECT),
        (502, True, "", Failure.RESET),
        (504, True, "", Failure.TIMEOUT),
        (503, False, "server busy", Failure.NODE),
        (500, False, "boom", Failure.NODE),
        (500, False, 'option "temperature" must be of type float32', Failure.CALLER),
        (400, False, "the input length exceeds the context length", Failure.CALLER),
        (500, False, "the input length exceeds the context length", Failure.CALLER),
        (500, False, "invalid JSON schema in format", Failure.CALLER),
        (500, False, "Failed to create new sequence: no input provided", Failure.CALLER),
        (500, False, "Failed to create new sequence: invalid image index: 7", Failure.CALLER),
        (500, False, "this model only supports one image while more than one image requested", Failure.CALLER),
        (404, False, "model 'x' not found", Failure.MISSING),
        *((status, False, "", Failure.NODE) for status in (201, 204, 206, 302, 304, 401, 403, 407, 413, 429, 999)),
        (401, False, "option of mine", Failure.NODE),
    ],
)
def test_who_is_at_fault(status: int, proxied: bool, message: str, expected: Failure) -> None:
    assert classify(status, proxied, message) is expected


def test_a_wrong_template_is_the_fault_of_who_brought_it() -> None:
    said = 'template: :3: function "currentDate" not defined'
    assert classify(500, False, said, template=True) is Failure.CALLER
    assert classify(500, False, said) is Failure.NODE, "the model's own, on a node that is too old for it"
    assert classify(500, False, "boom", template=True) is Failure.NODE


@pytest.mark.parametrize("said", ["image: unknown format", "unexpected EOF", "unable to tokenize mtmd embedding"])
def test_an_image_that_no_node_can_read_is_the_fault_of_who_brought_it(said: str) -> None:
    message = f"Failed to create new sequence: {said}"
    assert classify(500, False, message, images=True) is Failure.CALLER
    assert classify(500, False, message) is not Failure.CALLER
    assert classify(500, False, "boom", images=True) is Failure.NODE
    assert classify(500, False, said, images=True) is not Failure.CALLER
    for read in ("unable to encode mtmd image chunk", "no mtmd image embedding"):
        assert classify(500, False, f"Failed to create new sequence: {read}", images=True) is Failure.NODE


def test_the_callers_errors_are_never_retried() -> None:
    assert not may_retry(Failure.CALLER, History(), 5, RetryBudget(), 0.0)


def test_orphans_are_outside_the_budget_but_two_crashes_of_runners_end_it() -> None:
    empty = RetryBudget(floor=0.0)
    assert may_retry(Failure.CONNECT, History(attempts=1, connects=1), 2, empty, 0.0)
    assert not may_retry(Failure.CONNECT, History(attempts=3, connects=3), 2, empty, 0.0)
    assert may_retry(Failure.CRASH, History(attempts=1, crashes=1), 9, empty, 0.0)
    assert not may_retry(Failure.CRASH, History(attempts=2, crashes=2), 9, empty, 0.0)
    assert may_retry(Failure.DOWN, History(attempts=99, crashes=1, lost=LOST_MAX - 1), 2, empty, 0.0)


@pytest.mark.parametrize("nodes", range(1, 12))
def test_a_request_outlives_its_nodes_and_walks_through_no_large_fleet(nodes: int) -> None:
    empty, history = RetryBudget(floor=0.0), History()
    while True:
        history.attempts += 1
        count(history, Failure.RESET, 0.0)
        if not may_retry(Failure.RESET, history, nodes, empty, 0.0):
            break
    assert history.attempts == {1: 2, 2: 2, 3: 3}.get(nodes, LOST_MAX)
    assert history.crashes == 0


def test_who_was_on_two_lost_nodes_waits_until_those_that_die_with_them_are_gone() -> None:
    history = History()
    for failure in set(Failure) - {Failure.RESET}:
        count(history, failure, 50.0)
    count(history, Failure.RESET, 100.0)
    assert history.held_until == 0.0, "the first one is no wait"
    count(history, Failure.RESET, 101.0)
    assert history.held_until == 101.0 + SHUN
    assert (history.lost, history.crashes) == (2, 1)


def test_attempts_that_lost_their_node_are_none_of_the_three() -> None:
    budget, history = RetryBudget(floor=0.0, tokens=10.0), History()
    for failure in (Failure.CONNECT, Failure.RESET, Failure.DOWN, Failure.CRASH):
        history.attempts += 1
        count(history, failure, 0.0)
    for failure, tried in ((Failure.NODE, True), (Failure.TIMEOUT, True), (Failure.NONSENSE, False)):
        history.attempts += 1
        count(history, failure, 0.0)
        assert may_retry(failure, history, 9, budget, 0.0) is tried
    assert budget.tokens == 8.0


def test_a_node_that_lost_the_model_costs_no_budget() -> None:
    empty = RetryBudget(floor=0.0)
    assert may_retry(Failure.MISSING, History(attempts=1), 2, empty, 0.0)
    assert not may_retry(Failure.MISSING, History(attempts=3), 9, empty, 0.0)


def test_a_nodes_failures_are_retried_within_the_budget() -> None:
    budget = RetryBudget(floor=0.0, tokens=1.0)
    assert may_retry(Failure.NODE, History(attempts=1), 2, budget, 0.0)
    assert not may_retry(Failure.NODE, History(attempts=1), 2, budget, 0.0)
    for _ in range(5):
        budget.earn()
    assert may_retry(Failure.TIMEOUT, History(attempts=2), 2, budget, 0.0)
    budget.tokens = 10.0
    assert not may_retry(Failure.NODE, History(attempts=3), 2, budget, 0.0)


def spent(budget: RetryBudget, now: float) -> int:
    """How many retries it has at once."""
    return sum(budget.spend(now) for _ in range(1000))


def test_the_budget_is_a_share_of_the_requests_and_capped() -> None:
    budget = RetryBudget(floor=0.0)
    for _ in range(100):
        budget.earn()
    assert 19 <= spent(budget, 0.0) <= 20
    for _ in range(10_000):
        budget.earn()
    assert spent(budget, 0.0) == BUDGET_CAP


def test_a_gateway_that_has_just_started_has_a_few_retries_and_so_many_again_each_second() -> None:
    budget = RetryBudget()
    assert spent(budget, 1000.0) == BUDGET_FLOOR
    assert spent(budget, 1000.5) == BUDGET_FLOOR // 2
    assert spent(budget, 1060.0) == BUDGET_FLOOR, "nor are they saved"


@pytest.mark.parametrize("rate", [0.5, 5, 50, 500])
def test_of_requests_that_all_fail_a_fifth_is_retried_or_a_few_a_second_where_that_is_more(rate: float) -> None:
    """The two are not added up."""
    budget, seconds, retried = RetryBudget(), 60, 0
    for number in range(int(rate * seconds)):
        budget.earn()
        retried += sum(budget.spend(number / rate) for _ in range(ATTEMPTS_MAX - 1))
    assert retried <= max(BUDGET_SHARE * rate, BUDGET_FLOOR) * seconds + BUDGET_FLOOR
    assert retried >= min(ATTEMPTS_MAX - 1, max(BUDGET_SHARE, BUDGET_FLOOR / rate)) * rate * seconds * 0.95


def test_what_the_caller_hears() -> None:
    cause = ApiError(404, "model_not_found", "model 'x' not found")
    assert final_error(Failure.CALLER, History(), cause, 1.0) is cause
    assert final_error(Failure.MISSING, History(attempts=2), cause, 1.0) is cause
    assert final_error(Failure.CONNECT, History(), None, 1.0).status == 503
    assert final_error(Failure.CONNECT, History(), None, 1.0).retry_after
    assert final_error(Failure.TIMEOUT, History(attempts=3), None, 1.0).status == 504
    ended = final_error(Failure.RESET, History(attempts=2), ApiError(502, "upstream_error", "no valid HTTP"), 1.0)
    assert (ended.status, ended.message) == (502, f"{Failure.RESET.value} (2 attempts)")
    assert final_error(Failure.NODE, History(attempts=1), ApiError(500, "x", "boom"), 1.0).message.endswith(
        "attempt): boom"
    )


@pytest.mark.parametrize("failure", [kind for kind in Failure if kind not in (Failure.CALLER, Failure.MISSING)])
def test_what_a_node_did_wrong_counts_against_it_until_it_answers(failure: Failure) -> None:
    """HAProxy's 502 too: it is that for a head without end and for what is no HTTP."""
    node = Node("a", "", 2)
    for at in (100.0, 101.0, 102.0):
        shun(node, failure, "m", at)
    counts = failure in {classify(502, True, ""), Failure.CRASH, Failure.NODE, Failure.NONSENSE}
    assert node.failed == ({"m:latest": 3} if counts else {})
    holds(node, "m")
    assert node.failed == {}


def test_a_node_that_lacks_a_model_is_left_alone_with_that_one_and_one_that_failed_with_all() -> None:
    held = frozenset({"m:latest", "other:latest"})
    liar, other = (Node(name, "", 2, held=held, in_flight=busy) for name, busy in (("a", 0), ("b", 9)))
    shun(liar, Failure.MISSING, "m", 100.0)
    chosen = {(model, at): choose([liar, other], model, at) for model in held for at in (100.1, 100.1 + LOST)}
    assert [key for key, node in chosen.items() if node is other] == [("m:latest", 100.1)]
    assert choose([liar], "m:latest", 100.1) is liar, "where no other is left"
    assert choose([other, liar], "m:latest", 100.1, ("b",)) is liar, "before one that this request has tried"
    shun(liar, Failure.MISSING, "other", 110.0)
    assert liar.lost.keys() == {"other:latest"}
    holds(liar, "other")
    assert not liar.lost
    shun(liar, Failure.DOWN, "m", 150.0)
    assert (liar.failed, liar.gone_until, liar.shunned_until) == ({}, 0.0, 150.0 + SHUN), "control's word, not its own"
    shun(liar, Failure.NODE, "m", 200.0)
    assert (choose([liar, other], "m:latest", 200.1), liar.shunned_until) == (other, 200.0 + SHUN)
