"""Slots and tickets: who is served next, and where."""

from __future__ import annotations

import pytest

from corral.fleet.ledger import Grant, Ledger
from corral.fleet.slots import ABORTED, ABORTED_MAX, PlaceState, cool_down, own_slots, step_of
from corral.fleet.tickets import AHEAD_MAX, BATCH_LATER, NEVER, Request, Ticket, estimate, wait_bound

RESIDENT = PlaceState.RESIDENT


def ledger(slots: int = 1) -> Ledger:
    made = Ledger()
    made.place("n1", "a", RESIDENT, 1, 0.0, slots)
    return made


def served(made: Ledger, running: str, count: int) -> list[str]:
    """Who is served next, one after the other."""
    order = []
    for _ in range(count):
        (grant,) = made.release(running, 0.0)
        running = grant.request.id
        order.append(running)
    return order


def test_a_key_that_asks_for_much_does_not_hold_up_another() -> None:
    made = ledger()
    made.ask(Request("r", "g", "a", "greedy", cost=4.0), (), 0.0)
    for number in range(10):
        made.ask(Request(f"greedy{number}", "g", "a", "greedy", cost=4.0), (), 0.0)
    made.ask(Request("modest", "g", "a", "modest", cost=4.0), (), 1.0)
    assert made.position("modest", "a") == 2
    assert served(made, "r", 2) == ["greedy0", "modest"]


def test_weights_share_in_proportion() -> None:
    made = ledger()
    made.ask(Request("r", "g", "a"), (), 0.0)
    for number in range(12):
        made.ask(Request(f"heavy{number:02}", "g", "a", "heavy", cost=1.0, weight=3.0), (), 0.0)
        made.ask(Request(f"light{number:02}", "g", "a", "light", cost=1.0, weight=1.0), (), 0.0)
    first = served(made, "r", 12)
    assert 8 <= sum(name.startswith("heavy") for name in first) <= 10


def test_interactive_before_batch_until_the_batch_is_old() -> None:
    made = ledger()
    made.ask(Request("r", "g", "a"), (), 0.0)
    made.ask(Request("batch", "g", "a", "k1", batch=True), (), 0.0)
    made.ask(Request("soon", "g", "a", "k2"), (), BATCH_LATER - 1)
    made.ask(Request("late", "g", "a", "k3"), (), BATCH_LATER + 1)
    assert served(made, "r", 3) == ["soon", "batch", "late"]


def test_nobody_is_overtaken_beyond_the_bound() -> None:
    """A stream of new keys, each of which would be first: the one that waits is served within the bound."""
    made = ledger()
    made.ask(Request("r0", "g", "a"), (), 0.0)
    for number in range(100):
        made.ask(Request(f"flood{number:03}", "g", "a", "poor", cost=60.0), (), 0.0)
    last = "flood099"
    running, now, number = "r0", 0.0, 0
    while running != last:
        now += 1.0
        number += 1
        made.ask(Request(f"new{number:03}", "g", "a", f"key{number}", cost=1.0), (), now)
        (grant,) = made.release(running, now)
        running = grant.request.id
        assert number < 200
    assert now <= AHEAD_MAX + 101


def test_a_long_prompt_is_read_alone_among_its_kind_and_holds_up_no_short_one() -> None:
    made = ledger(slots=4)
    made.ask(Request("chat", "g", "a", prompt=10), (), 0.0)
    assert isinstance(made.ask(Request("long1", "g", "a", prompt=9000), (), 0.0), Grant)
    assert isinstance(made.ask(Request("long2", "g", "a", prompt=9000), (), 0.0), Ticket)
    assert isinstance(made.ask(Request("short", "g", "a", prompt=10), (), 0.0), Grant)
    assert [grant.request.id for grant in made.read("long1", 1.0)] == ["long2"]


def test_embeddings_have_their_share_of_a_node_whatever_the_model() -> None:
    made = ledger(slots=8)
    made.place("n1", "b", RESIDENT, 1, 0.0, 4)
    assert isinstance(made.ask(Request("e1", "g", "a", embed=True), (), 0.0), Grant)
    assert isinstance(made.ask(Request("e2", "g", "b", embed=True), (), 0.0), Grant)
    assert isinstance(made.ask(Request("e3", "g", "b", embed=True), (), 0.0), Ticket)
    assert isinstance(made.ask(Request("chat", "g", "b"), (), 0.0), Grant)
    assert [grant.request.id for grant in made.release("e1", 0.0)] == ["e3"], "another model's embedding ended"


def test_a_model_with_more_slots_gives_embeddings_of_another_their_turn() -> None:
    made = ledger()
    made.place("n1", "b", RESIDENT, 1, 0.0, 4)
    made.ask(Request("e1", "g", "b", embed=True), (), 0.0)
    made.ask(Request("e2", "g", "b", embed=True), (), 0.0)
    assert [grant.request.id for grant in made.place("n1", "c", RESIDENT, 1, 0.0, 8)] == ["e2"]


def test_who_becomes_free_is_looked_at_however_many_are_busy() -> None:
    """Of 100 nodes that read a long prompt, the last is done with it: the next long prompt goes there."""
    made = Ledger()
    for number in range(100):
        made.place(f"n{number:03}", "a", RESIDENT, 1, 0.0, 4)
    for number in range(100):
        made.ask(Request(f"s{number:03}", "g", "a"), (f"n{number:03}",), 0.0)
        made.ask(Request(f"l{number:03}", "g", "a", prompt=9000), (f"n{number:03}",), 0.0)
    assert isinstance(made.ask(Request("next", "g", "a", prompt=9000), (), 0.0), Ticket)
    (grant,) = made.read("l099", 0.0)
    assert (grant.request.id, grant.node) == ("next", "n099")


def test_the_least_loaded_by_speed_is_taken() -> None:
    made = Ledger()
    made.place("fast", "a", RESIDENT, 1, 0.0, 4, step_of(4, 60.0, 60.0))
    made.place("slow", "a", RESIDENT, 1, 0.0, 4, step_of(4, 20.0, 60.0))
    nodes = []
    for number in range(8):
        grant = made.ask(Request(f"r{number}", "g", "a"), (), 0.0)
        assert isinstance(grant, Grant)
        nodes.append(grant.node)
    assert nodes == ["fast", "slow", "fast", "fast", "fast", "slow", "slow", "slow"]


@pytest.mark.parametrize(
    ("decoding", "left", "prefill", "seconds"),
    [(True, 0, 0, ABORTED), (False, 5000, 2500, 2.0), (False, 1e6, 2500, ABORTED_MAX), (False, 10, 0, ABORTED_MAX)],
)
def test_a_slot_of_an_aborted_request_cools_down(decoding: bool, left: float, prefill: float, seconds: float) -> None:
    assert cool_down(decoding, left, prefill) == seconds


def test_without_the_store_each_gateway_has_slots_of_its_own() -> None:
    gateways = [f"gateway-{number}" for number in range(4)]
    shares = [[own_slots(gateways, one, f"n{node}", "m", 8) for one in gateways] for node in range(200)]
    assert {tuple(of) for of in shares} == {(2, 2, 2, 2)}
    uneven = [[own_slots(gateways, one, f"n{node}", "m", 6) for one in gateways] for node in range(200)]
    assert {sum(of) for of in uneven} == {6}, "each slot is somebody's, and nobody else's"
    assert {slots for of in uneven for slots in of} == {1, 2}
    for number in range(4):
        assert 1.35 <= sum(of[number] for of in uneven) / 200 <= 1.65, "what is over falls to each of them alike"
    assert sum(own_slots(gateways, one, "n1", "m", 3) for one in gateways) == 4, "one at least"
    assert own_slots(gateways, "gateway-9", "n1", "m", 0) == 1
    fewer = [own_slots(gateways[:3], gateways[0], f"n{node}", "m", 8) for node in range(200)]
    assert all(after >= before[0] for after, before in zip(fewer, shares, strict=True)), (
        "one that goes leaves its share"
    )


def test_what_is_told_to_who_waits() -> None:
    assert estimate(3, 4, 4.0) == 3.0
    assert estimate(1, 4, 4.0, load=8.0) == 9.0
    assert wait_bound(30.0, 40.0, 10.0, placed=False) == 70.0
    assert [wait_bound(30.0, load, 0.0, placed=False) for load in (20.0, 60.0, 600.0)] == [30.0, 90.0, 900.0]
    assert wait_bound(30.0, 40.0, 10.0, placed=True) == 30.0


def test_one_that_avoids_the_free_node_holds_up_none_that_may_use_it() -> None:
    made = Ledger()
    for node in ("n1", "n2"):
        made.place(node, "a", RESIDENT, 1, 0.0, 1)
        assert isinstance(made.ask(Request(node, "g", "a"), (node,), 0.0), Grant)
    for id, avoided in (("first", "n2"), ("second", "n2"), ("third", "n1")):
        assert isinstance(made.ask(Request(id, "g", "a", picky=True), (NEVER + avoided,), 0.0), Ticket)
    (grant,) = made.release("n2", 0.0)
    assert (grant.request.id, grant.node) == ("third", "n2")
    assert made.release("third", 0.0) == []
    fourth = made.ask(Request("fourth", "g", "a", picky=True), (NEVER + "n1",), 0.0)
    assert isinstance(fourth, Grant), "nor do they wait"
    (grant,) = made.release("n1", 0.0)
    assert (grant.request.id, grant.node) == ("first", "n1")
