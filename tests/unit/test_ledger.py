"""Slots and tickets: no slot twice, nobody lost, nobody overtaken, nobody starved."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.scheduler import Promises, Spot, Told

from corral.fleet.ledger import LEASE, Grant, Ledger
from corral.fleet.placement import Action, Demand, Host, Planner, Stand
from corral.fleet.slots import ABORTED, ABORTED_MAX, PlaceState, cool_down, own_slots, step_of
from corral.fleet.tickets import AHEAD_MAX, BATCH_LATER, LONG, NEVER, Request, Ticket, estimate, wait_bound

NODES = ("n1", "n2", "n3")
MODELS = ("a", "b")
GATEWAYS = ("g1", "g2")
RESIDENT = PlaceState.RESIDENT
BECOMES = {Action.LOAD: PlaceState.LOADING, Action.DRAIN: PlaceState.DRAINING, Action.UNLOAD: PlaceState.ABSENT}


class Scheduler(RuleBasedStateMachine):
    """Gateways that ask, end, cancel and die, and a leader that moves models, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(queue_length=6)
        self.promises = Promises()
        self.now = 0.0
        self.number = 0
        self.alive: dict[str, float] = {}
        self.scores: dict[str, float] = {}
        self.told: dict[str, Told] = {}
        self.last: dict[str, float] = {}

    @initialize()
    def residents(self) -> None:
        for model, node in zip(MODELS, NODES, strict=False):
            self.move(node, model, RESIDENT, 2)

    def heard(self, grants: list[Grant]) -> None:
        for grant in grants:
            told = self.told[grant.request.id]
            # Whoever is ahead, and may use a slot now, is served first.
            mine = (self.scores[told.id], told.id)
            for other in self.promises.waiting.values():
                if other.model == told.model and (self.scores[other.id], other.id) < mine:
                    assert grant.node not in self.promises.usable(other), f"{told.id} overtakes {other.id}"
            self.promises.given(told, grant.node)

    @rule(
        gateway=st.sampled_from(GATEWAYS),
        model=st.sampled_from(MODELS),
        prompt=st.sampled_from((100, LONG + 1)),
        embed=st.booleans(),
        batch=st.booleans(),
        key=st.sampled_from(("k1", "k2")),
        preferred=st.lists(st.sampled_from(NODES), max_size=2),
        avoids=st.one_of(st.just(frozenset()), st.frozensets(st.sampled_from(NODES), max_size=2)),
    )
    def ask(
        self,
        gateway: str,
        model: str,
        prompt: int,
        embed: bool,
        batch: bool,
        key: str,
        preferred: list[str],
        avoids: frozenset[str],
    ) -> None:
        self.number += 1
        told = Told(f"r{self.number:03}", gateway, model, prompt, embed, batch, self.number, avoids)
        self.told[told.id] = told
        request = Request(told.id, gateway, model, key, prompt, 2.0, 1.0, batch, embed, bool(avoids))
        waiting = [other for other in self.promises.waiting.values() if other.model == model]
        usable = self.promises.usable(told)
        words = (*preferred, *(NEVER + node for node in sorted(avoids)))
        answer = self.ledger.ask(request, words, self.now)
        self.alive.setdefault(gateway, self.now + LEASE)  # to ask is not to renew
        if isinstance(answer, Grant):
            for other in waiting:
                assert not self.promises.usable(other), f"{told.id} barges past {other.id}"
            if wanted := [node for node in preferred if node in usable]:
                assert answer.node == wanted[0]
            self.promises.given(told, answer.node)
        elif isinstance(answer, Ticket):
            assert not usable, f"{told.id} waits though {usable} are free"
            assert self.now <= answer.score <= self.now + AHEAD_MAX + (BATCH_LATER if batch else 0.0)
            self.scores[told.id] = answer.score
            self.promises.waiting[told.id] = told
        else:
            assert len(waiting) >= 6 and not usable  # an orphan is not turned away
            self.promises.ended.add(told.id)
        again = self.ledger.ask(request, (), self.now) if answer is not None else None
        assert again is answer, "asked twice, answered differently"

    @precondition(lambda self: self.promises.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.promises.running)))
        self.promises.over(id)
        self.heard(self.ledger.release(id, self.now))
        assert self.ledger.release(id, self.now) == []

    @precondition(lambda self: self.promises.reading)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.promises.reading)))
        self.promises.reading.discard(id)
        self.heard(self.ledger.read(id, self.now))

    @precondition(lambda self: self.promises.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.promises.waiting)))
        model = self.told[id].model
        assert self.ledger.position(id, model) >= 1
        self.promises.over(id)
        assert self.ledger.cancel(id, model) and not self.ledger.cancel(id, model)

    @precondition(lambda self: self.promises.running)
    @rule(data=st.data())
    def orphan(self, data: st.DataObject) -> None:
        """A node died under a request, and it goes back to the head."""
        id = data.draw(st.sampled_from(sorted(self.promises.running)))
        told, _ = self.promises.running.pop(id)
        self.promises.reading.discard(id)
        self.promises.waiting[id], self.scores[id] = told, 0.0
        words = tuple(NEVER + node for node in sorted(told.avoids))
        self.heard(self.ledger.requeue(id, 0.0, 0.0, words, self.now))

    @rule(
        node=st.sampled_from(NODES),
        model=st.sampled_from(MODELS),
        state=st.sampled_from(list(PlaceState)),
        slots=st.sampled_from((1, 2, 3, 8)),
    )
    def move(self, node: str, model: str, state: PlaceState, slots: int) -> None:
        spot = self.promises.spots.get((node, model))
        generation = 1 + (spot.generation if spot else 0)
        self.promises.spots[node, model] = Spot(state, generation, slots)
        self.heard(self.ledger.place(node, model, state, generation, self.now, slots, step_of(slots, 0, 0)))

    @rule(rates=st.tuples(*[st.sampled_from((0.0, 0.0, 1.0))] * len(MODELS)), room=st.sampled_from((1, 2)))
    def look(self, rates: tuple[float, ...], room: int) -> None:
        """The leader looks and moves models: on demand only what somebody waits for whom no free slot would serve."""
        hosts = {node: Host(node, max_models=room, slots=2, held=frozenset(MODELS)) for node in NODES}
        for (node, model), spot in self.promises.spots.items():
            if spot.state != PlaceState.ABSENT:
                in_use = self.promises.used(node, model)
                hosts[node].places[model] = Stand(PlaceState(spot.state), self.now - 100.0, in_use, spot.slots)
        demands = {model: Demand(model, rate, load=2.0) for model, rate in zip(MODELS, rates, strict=True)}
        for model, queue in self.ledger.queues.items():
            oldest = queue.oldest()
            demands[model].waiting = len(queue)
            demands[model].oldest = 0.0 if oldest is None else self.now - oldest
        for step in Planner(list(hosts.values()), demands, self.now).plan():
            wanted = step.model if step.action is Action.LOAD else step.wanted
            if wanted and not demands[wanted].rate:
                waiting = [told for told in self.promises.waiting.values() if told.model == wanted]
                assert waiting, f"{step} though nobody waits"
                assert not any(map(self.promises.usable, waiting)), f"{step} though a free slot would serve"
            self.move(step.node, step.model, BECOMES[step.action], 2)

    @precondition(lambda self: self.promises.spots)
    @rule(data=st.data())
    def old_word(self, data: st.DataObject) -> None:
        """A leader that was deposed says that a model is resident."""
        node, model = data.draw(st.sampled_from(sorted(self.promises.spots)))
        spot = self.promises.spots[node, model]
        if (node, model) in self.ledger.places:
            assert self.ledger.place(node, model, RESIDENT, spot.generation - 1, self.now, 99) == []

    @rule(seconds=st.sampled_from((0.1, 3.0, 11.0)), silent=st.sampled_from(("", *GATEWAYS)))
    def time(self, seconds: float, silent: str) -> None:
        """Time passes; all gateways but one say that they live."""
        self.now += seconds
        for gateway in GATEWAYS:
            if gateway != silent and gateway in self.alive:
                self.ledger.renew(gateway, self.now)
                self.alive[gateway] = self.now + LEASE
        gone = {gateway for gateway, until in self.alive.items() if until <= self.now}
        for id in [id for id, told in self.told.items() if told.gateway in gone and id not in self.promises.ended]:
            self.promises.over(id)
        for gateway in gone:
            del self.alive[gateway]
        self.heard(self.ledger.expire(self.now))

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        self.promises.settled()

    @invariant()
    def nothing_is_lost(self) -> None:
        assert set(self.ledger.grants) == set(self.promises.running)
        waiting = {id for queue in self.ledger.queues.values() for id in queue.tickets}
        assert waiting == set(self.promises.waiting)
        for (node, model), place in self.ledger.places.items():
            assert place.in_use == self.promises.used(node, model)


TestScheduler = Scheduler.TestCase
TestScheduler.settings = settings(
    max_examples=150, stateful_step_count=60, suppress_health_check=list(HealthCheck), derandomize=True
)


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
