"""The scheduler's promises, in any order of what may happen: no slot twice, nobody lost, overtaken or starved."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.scheduler import Promises, Spot, Told

from corral.fleet.ledger import LEASE, Grant, Ledger
from corral.fleet.placement import Action, Demand, Host, Planner, Stand, Step
from corral.fleet.slots import PlaceState, step_of
from corral.fleet.tickets import AHEAD_MAX, BATCH_LATER, LONG, NEVER, Request, Ticket

NODES = ("n1", "n2", "n3")
MODELS = ("a", "b")
GATEWAYS = ("g1", "g2")
RESIDENT = PlaceState.RESIDENT
BECOMES = {Action.LOAD: PlaceState.LOADING, Action.DRAIN: PlaceState.DRAINING, Action.UNLOAD: PlaceState.ABSENT}


def for_whom(step: Step) -> str:
    """The model that is to be loaded, at once or when another one has left; "" for one that is just unloaded."""
    return step.model if step.action is Action.LOAD else step.wanted


class Scheduler(RuleBasedStateMachine):
    """Gateways that ask, end, cancel and die, and a leader that moves models, in any order.

    No on-demand load while a free resident slot would serve: a request is given a slot nowhere but where its model is
    resident (`Promises.given`), and what the leader loads or drains for those who wait, it does for none whom a free
    slot would serve (`look`). On demand is what it would not do if nobody waited, and all that is done for a model that
    nobody has asked for lately: a load for arrivals that are expected may come while slots are free, or it would be
    late for all of them.

    No starvation beyond the bound: for a slot that it may use, nobody who waits is passed over for one that came later
    than the bound after it, with a ticket or without (`passed_over`). Orphans are served first: they had their turn. In
    requests, not in time: how long those ahead of it run is theirs. Who waits for a model that is nowhere and has
    waited for so long has room made for it at once, where a node is free to (`look`).
    """

    nodes = NODES
    cost = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(queue_length=6)
        self.promises = Promises()
        self.now = 0.0
        self.number = 0
        self.alive: dict[str, float] = {}
        self.scores: dict[str, float] = {}
        self.told: dict[str, Told] = {}
        self.came: dict[str, float] = {}
        self.orphans: set[str] = set()
        self.coming: dict[str, str] = {}

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
            self.passed_over(told, grant.node)
            self.promises.given(told, grant.node)

    def passed_over(self, told: Told, node: str) -> None:
        for other in self.promises.waiting.values():
            bound = AHEAD_MAX + (BATCH_LATER if other.batch else 0.0)
            late = self.came[told.id] - self.came[other.id]
            if other.model == told.model and late > bound and told.id not in self.orphans:
                assert node not in self.promises.usable(other), f"{told.id} came {late} s after {other.id}"

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
        self.told[told.id], self.came[told.id] = told, self.now
        request = Request(told.id, gateway, model, key, prompt, self.cost, 1.0, batch, embed, bool(avoids))
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
            self.passed_over(told, answer.node)
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
        self.orphans.add(id)
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
        self.moved(node, model, state, slots)

    def moved(self, node: str, model: str, state: PlaceState, slots: int) -> None:
        spot = self.promises.spots.get((node, model))
        generation = 1 + (spot.generation if spot else 0)
        self.promises.spots[node, model] = Spot(state, generation, slots)
        self.heard(self.ledger.place(node, model, state, generation, self.now, slots, step_of(slots, 0, 0)))

    @rule(rates=st.tuples(*[st.sampled_from((0.0, 0.0, 1.0))] * len(MODELS)), room=st.sampled_from((1, 2)))
    def look(self, rates: tuple[float, ...], room: int) -> None:
        self.plan(rates, room)

    def plan(self, rates: tuple[float, ...], room: int) -> None:
        """The leader looks and moves models."""
        demands = {model: Demand(model, rate, load=2.0) for model, rate in zip(MODELS, rates, strict=True)}
        unasked = Counter(map(for_whom, Planner(self.hosts(room), demands, self.now).plan()))
        for model, queue in self.ledger.queues.items():
            oldest = queue.oldest()
            demands[model].waiting = len(queue)
            demands[model].oldest = 0.0 if oldest is None else self.now - oldest
        hosts = self.hosts(room)
        planner = Planner(hosts, demands, self.now)
        steps = planner.plan()
        for model, count in Counter(map(for_whom, steps)).items():
            if model and (count > unasked[model] or not demands[model].rate):
                waiting = [told for told in self.promises.waiting.values() if told.model == model]
                assert waiting, f"{steps} though nobody waits for {model}"
                assert not any(map(self.promises.usable, waiting)), f"{steps} though a free slot of {model} would serve"
        placed = {
            model for host in hosts for model, stand in host.places.items() if stand.state is not PlaceState.DRAINING
        }
        for demand in demands.values():
            nowhere = demand.name not in placed and demand.name not in self.coming.values()
            if demand.waiting and nowhere and planner.overdue(demand) and demand.name not in map(for_whom, steps):
                free = {host.name for host in hosts if not host.moves} - {step.node for step in steps}
                assert all(self.needed(demand, demands, hosts, node) for node in free), f"{demand} is passed over"
        for step in steps:
            self.move(step.node, step.model, BECOMES[step.action], 2)
            if step.wanted:
                self.coming[step.node] = step.wanted

    def hosts(self, room: int) -> list[Host]:
        """The nodes as the leader knows them."""
        hosts = {node: Host(node, max_models=room, slots=2, held=frozenset(MODELS)) for node in self.nodes}
        for (node, model), spot in self.promises.spots.items():
            if spot.state != PlaceState.ABSENT:
                in_use = self.promises.used(node, model)
                hosts[node].places[model] = Stand(PlaceState(spot.state), self.now - 100.0, in_use, spot.slots)
        for host in hosts.values():
            if not host.moves or self.coming.get(host.name, "") in host.places:
                self.coming.pop(host.name, None)
            host.coming = self.coming.get(host.name, "")
        return list(hosts.values())

    @staticmethod
    def needed(demand: Demand, demands: dict[str, Demand], hosts: list[Host], node: str) -> bool:
        """Whether what stands on a node is the last copy of a model that somebody waits for who came earlier."""
        here = next(host for host in hosts if host.name == node).places
        return len(here) == 1 and all(
            sum(model in host.places for host in hosts) == 1
            and demands[model].waiting
            and demands[model].oldest >= demand.oldest
            for model in here
        )

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
        self.passes(seconds, silent)

    def passes(self, seconds: float, silent: str) -> None:
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


class Led(Scheduler):
    """The same where the leader alone moves models, nobody dies and there is little room: so requests wait for long."""

    cost = 100.0

    @initialize(nodes=st.sampled_from((1, 2)), burst=st.sampled_from((0, 5)))
    def residents(self, nodes: int, burst: int) -> None:  # type: ignore[override]
        self.nodes = NODES[:nodes]
        for node in self.nodes:
            self.move(node, MODELS[0], RESIDENT, 2)
        for _ in range(burst):
            self.come("k1")

    @rule(key=st.sampled_from(("k1", "k2")))
    def come(self, key: str) -> None:
        """One like many others."""
        self.ask(GATEWAYS[0], MODELS[0], 100, False, False, key, [], frozenset())

    def move(self, node: str, model: str, state: PlaceState, slots: int) -> None:
        self.moved(node, model, state, slots)

    @rule(rates=st.tuples(*[st.sampled_from((0.0, 0.1, 1.0))] * len(MODELS)))
    def look(self, rates: tuple[float, ...]) -> None:  # type: ignore[override]
        self.plan(rates, 1)

    @rule()
    def loaded(self) -> None:
        """What loads is there."""
        for (node, model), spot in list(self.promises.spots.items()):
            if spot.state == PlaceState.LOADING:
                self.move(node, model, RESIDENT, 2)

    @rule(seconds=st.sampled_from((0.5, 3.0, 20.0, 20.0)))
    def time(self, seconds: float) -> None:  # type: ignore[override]
        self.passes(seconds, "")


def runs(examples: int) -> settings:
    """So many orders of what may happen, always the same."""
    every = list(HealthCheck)
    return settings(max_examples=examples, stateful_step_count=60, suppress_health_check=every, derandomize=True)


TestScheduler, TestLed = Scheduler.TestCase, Led.TestCase
TestScheduler.settings, TestLed.settings = runs(150), runs(300)
