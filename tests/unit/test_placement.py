"""Which model stands where: what must never be decided, and what must be."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corral.fleet.alike import STAY
from corral.fleet.demand import NOBODY, Mean, Rate, cost, wait
from corral.fleet.placement import OVERDUE, PATIENCE, WORTH, Action, Demand, Host, Planner, Stand, Step
from corral.fleet.simulation import Asked, Shape, Simulation
from corral.fleet.slots import PlaceState

LOADING, RESIDENT, DRAINING = PlaceState.LOADING, PlaceState.RESIDENT, PlaceState.DRAINING
MODELS = ("a", "b", "c", "d")
GIB = 1 << 30


def host(name: str = "n1", *resident: str, since: float = -1e6, **others: int) -> Host:
    """A node that has all models on its disk, and some in memory."""
    made = Host(name, held=frozenset(MODELS), **others)  # type: ignore[arg-type]
    for model in resident:
        made.places[model] = Stand(RESIDENT, since)
    return made


def plan(hosts: list[Host], *demands: Demand, now: float = 0.0) -> list[Step]:
    """The steps, without their reasons' words."""
    return Planner(hosts, {demand.name: demand for demand in demands}, now).plan()


def did(steps: list[Step]) -> list[tuple[str, str, str]]:
    return [(step.action.value, step.node, step.model) for step in steps]


def test_what_is_asked_for_is_loaded_where_there_is_room() -> None:
    steps = plan([host(max_models=2)], Demand("a", rate=1.0), Demand("b"))
    assert did(steps) == [("load", "n1", "a")]


def test_a_node_does_one_thing_at_a_time() -> None:
    assert len(plan([host(max_models=2)], Demand("a", rate=1.0), Demand("b", rate=1.0))) == 1
    busy = host(max_models=3)
    busy.places["c"] = Stand(LOADING, 0.0)
    assert plan([busy], Demand("a", rate=9.0, waiting=9, oldest=99.0), Demand("c")) == []


def test_two_nodes_do_not_make_room_for_the_same_one_copy() -> None:
    """Nor does a second one while the first still drains."""
    nowhere = Demand("c", rate=0.1, waiting=1, oldest=20.0)
    hosts = [host("n1", "a", max_models=1), host("n2", "b", max_models=1)]
    (step,) = plan(hosts, Demand("a", rate=0.3), Demand("b", rate=0.2), nowhere)
    assert (step.action, step.node, step.wanted) == (Action.DRAIN, "n2", "c"), "the one that is asked less goes"
    hosts[1].places["b"].state, hosts[1].places["b"].in_use, hosts[1].coming = DRAINING, 1, "c"
    assert plan(hosts, Demand("a", rate=0.3), Demand("b", rate=0.2), nowhere) == []


def test_a_place_that_drains_is_unloaded_when_nothing_runs_there() -> None:
    one = host("n1", max_models=1)
    one.places["a"] = Stand(DRAINING, 0.0, in_use=1)
    assert plan([one], Demand("a")) == []
    one.places["a"].in_use = 0
    assert did(plan([one], Demand("a"))) == [("unload", "n1", "a")]


@pytest.mark.parametrize("kept", [Demand("a", pins=frozenset({"n1"})), Demand("a", copies=1)])
def test_pins_and_least_copies_are_held_whatever_waits(kept: Demand) -> None:
    planner = Planner([host("n1", "a", max_models=1)], {"a": kept, "b": Demand("b", 9.0, 99, 999.0)}, 0.0)
    assert planner.plan() == []
    assert "pinned" in planner.notes["b"], "and why is known"


def test_least_copies_are_held_within_one_plan() -> None:
    hosts = [host("n1", "a", max_models=1), host("n2", "a", max_models=1)]
    waits = {"b": Demand("b", 0.1, 1, 99.0), "c": Demand("c", 0.1, 1, 99.0)}
    steps = plan(hosts, Demand("a", copies=1), *waits.values())
    assert did(steps) == [("drain", "n1", "a")]


def test_pins_and_least_copies_are_made() -> None:
    hosts = [host("n1", max_models=2), host("n2", max_models=2)]
    assert did(plan(hosts, Demand("a", pins=frozenset({"n2"})))) == [("load", "n2", "a")]
    assert sorted(did(plan(hosts, Demand("a", copies=1), Demand("b", copies=1)))) == [
        ("load", "n1", "a"),
        ("load", "n2", "b"),
    ]


def test_a_model_that_is_nowhere_gets_room_within_its_patience_and_no_sooner_than_it_is_worth() -> None:
    hosts = [host("n1", "a", max_models=1)]
    used = Demand("a", rate=0.5)
    early = Demand("b", rate=0.001, waiting=1, oldest=PATIENCE * 10.0 - 0.1)
    late = Demand("b", rate=0.001, waiting=1, oldest=PATIENCE * 10.0)
    assert plan(hosts, used, early) == []
    assert did(plan(hosts, used, late)) == [("drain", "n1", "a")]


def test_a_model_that_was_just_loaded_stays_until_another_is_overdue() -> None:
    hosts = [host("n1", "a", max_models=1)]
    hosts[0].places["a"].in_use = 1
    used = Demand("a", rate=0.5)
    fresh = STAY * 10.0 - 1.0 - 1e6
    waits = Demand("b", rate=0.1, waiting=1, oldest=OVERDUE * 10.0 - 0.1)
    assert plan(hosts, used, waits, now=fresh) == []
    assert did(plan(hosts, used, waits, now=fresh + 2.0)) == [("drain", "n1", "a")]
    waits.oldest += 0.2
    assert did(plan(hosts, used, waits, now=fresh)) == [("drain", "n1", "a")]


def test_the_last_copy_is_not_taken_from_those_who_wait_longer() -> None:
    hosts = [host("n1", "a", max_models=1)]
    waits = Demand("b", rate=0.1, waiting=5, oldest=20.0)
    assert plan(hosts, Demand("a", rate=0.1, waiting=1, oldest=21.0), waits) == []
    assert did(plan(hosts, Demand("a", rate=0.1, waiting=1, oldest=19.0), waits)) == [("drain", "n1", "a")]


@pytest.mark.parametrize(("load", "late"), [(8.0, 12.0), (20.0, 10.0), (60.0, 30.0)])
def test_room_is_made_so_early_that_the_oldest_is_served_within_its_bound(load: float, late: float) -> None:
    """What was just loaded goes when a drain and a load end just within max(queue.wait, 1.5 x load + drain)."""
    hosts = [host("n1", "a", max_models=1, since=-1.0)]
    hosts[0].places["a"].in_use = 1
    used = Demand("a", rate=0.5, load=load)
    waits = Demand("b", rate=0.1, waiting=1, oldest=late - 0.1, load=load)
    assert plan(hosts, used, waits) == []
    waits.oldest = late
    assert did(plan(hosts, used, waits)) == [("drain", "n1", "a")]


def test_where_not_all_have_room_that_are_to_have_a_copy_who_waits_has_its_turn() -> None:
    hosts = [host("n1", "a", max_models=1)]
    kept = Demand("a", rate=0.5, copies=1)
    assert plan(hosts, kept, Demand("b", waiting=1, oldest=11.9, load=8.0, copies=1)) == []
    assert plan(hosts, kept, Demand("b", waiting=0, oldest=99.0, load=8.0, copies=1)) == [], "nobody asks for it"
    assert plan(hosts, kept, Demand("b", waiting=1, oldest=99.0, load=8.0)) == [], "none is promised to it"
    assert did(plan(hosts, kept, Demand("b", waiting=1, oldest=12.0, load=8.0, copies=1))) == [("drain", "n1", "a")]


@settings(max_examples=60, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    load=st.sampled_from((2.0, 8.0, 20.0, 60.0)),
    nodes=st.integers(1, 3),
    busy=st.lists(st.tuples(st.floats(0, 400), st.integers(1, 4000), st.integers(1, 300)), max_size=120),
    at=st.floats(250, 350),
)
def test_the_first_request_of_a_model_that_is_nowhere_waits_within_the_bound(
    load: float, nodes: int, busy: list[tuple[float, int, int]], at: float
) -> None:
    """max(queue.wait, 1.5 x load + drain); a turn of the leader, and its own prompt, come to that."""
    others = [Asked(when, MODELS[number % nodes], *rest) for number, (when, *rest) in enumerate(sorted(busy))]
    asked = sorted([*others, Asked(at, "d", 100, 60)], key=lambda one: one.at)
    shape = Shape(nodes=nodes, room=1, load=load)
    outcome = Simulation(shape, MODELS).run(asked)
    moves = [when for when, reason in outcome.reasons if "load" in reason and when <= at < when + load + 1]
    first = outcome.first[asked.index(Asked(at, "d", 100, 60))]
    # What drains runs when it begins, or was given a slot before that.
    drain = max([one.prompt / shape.prefill + one.output / 60 for one in others], default=0.0)
    # A node that loads when it comes does that first.
    bound = max(30.0, 1.5 * load + drain) + (load if moves else 0.0) + 2 * shape.tick + 100 / shape.prefill
    assert first <= bound + 1e-6, outcome.reasons


def test_equal_demand_moves_nothing() -> None:
    hosts = [host("n1", "a", max_models=1), host("n2", "b", max_models=1)]
    assert plan(hosts, Demand("a", rate=0.30), Demand("b", rate=0.33)) == []


def test_memory_is_a_bound_and_what_never_fits_is_said() -> None:
    small = host("n1", "a", memory=10 * GIB)
    planner = Planner([small], {"a": Demand("a", size=6 * GIB), "b": Demand("b", 1.0, 1, 99.0, size=11 * GIB)}, 0.0)
    assert planner.plan() == []
    assert "memory" in planner.notes["b"]
    assert did(plan([small], Demand("a", size=6 * GIB), Demand("b", 1.0, 1, 99.0, size=4 * GIB))) == [
        ("load", "n1", "b")
    ]
    assert did(plan([small], Demand("a", size=6 * GIB), Demand("b", 1.0, 1, 99.0, size=5 * GIB))) == [
        ("drain", "n1", "a")
    ]


def test_a_node_that_is_not_ready_or_lacks_the_files_gets_nothing() -> None:
    away = host("n1", max_models=1)
    away.ready = False
    empty = Host("n2", max_models=1)
    planner = Planner([away, empty], {"a": Demand("a", 1.0, 1, 99.0)}, 0.0)
    assert planner.plan() == []
    assert "disk" in planner.notes["a"]


stands = st.builds(
    Stand,
    st.sampled_from((LOADING, RESIDENT, DRAINING)),
    st.floats(0, 100),
    st.integers(0, 4),
)
hosts = st.builds(
    Host,
    name=st.just(""),
    ready=st.booleans(),
    memory=st.sampled_from((0, 12 * GIB)),
    max_models=st.integers(0, 3),
    held=st.frozensets(st.sampled_from(MODELS)),
    places=st.dictionaries(st.sampled_from(MODELS), stands, max_size=3),
    coming=st.sampled_from(("", *MODELS)),
)
demands = st.tuples(
    *(
        st.builds(
            Demand,
            st.just(model),
            rate=st.floats(0, 20),
            waiting=st.integers(0, 50),
            oldest=st.floats(0, 200),
            size=st.integers(1, 14).map(lambda size: size * GIB),
            copies=st.integers(0, 2),
            pins=st.frozensets(st.sampled_from(("n0", "n1")), max_size=1),
        )
        for model in MODELS
    )
)


@settings(max_examples=400, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(hosts, min_size=1, max_size=4), demands)
def test_no_decision_breaks_what_is_promised(fleet: list[Host], asked: tuple[Demand, ...]) -> None:
    for number, one in enumerate(fleet):
        one.name = f"n{number}"
    models = {demand.name: demand for demand in asked}
    copies = dict.fromkeys(MODELS, 0)
    for one in fleet:
        for model, stand in one.places.items():
            copies[model] += one.ready and stand.state in (LOADING, RESIDENT)
    began: set[str] = set()
    for step in Planner(fleet, models, 200.0).plan():
        one = fleet[int(step.node[1:])]
        assert one.ready and step.reason
        if step.action is Action.UNLOAD:
            assert one.places[step.model].state is DRAINING and not one.places[step.model].in_use
            continue
        assert step.node not in began and not one.moves, "one thing at a time on a node"
        began.add(step.node)
        after = set(one.places)
        if step.action is Action.DRAIN:
            assert one.places[step.model].state is RESIDENT
            assert step.node not in models[step.model].pins
            copies[step.model] -= 1
            wanted = models[step.wanted]
            claim = (
                wanted.copies > 0 == copies[step.wanted] and wanted.waiting and wanted.oldest >= PATIENCE * wanted.load
            )
            assert copies[step.model] >= models[step.model].copies or claim
            after = (after - {step.model}) | {step.wanted}
            copies[step.wanted] += 1
        else:
            after.add(step.model)
            copies[step.model] += 1
        assert (after - set(one.places)) <= one.held
        assert not one.max_models or len(after) <= one.max_models
        assert not one.memory or sum(models[model].size for model in after) <= one.memory


def hurries(hosts: list[Host], *demands: Demand) -> bool:
    """Whether the next look is to be soon, after a plan."""
    planner = Planner(hosts, {demand.name: demand for demand in demands}, 0.0)
    planner.plan()
    return planner.hurries


def test_the_next_look_is_soon_while_somebody_waits_for_it() -> None:
    assert not hurries([host("n1", "a", max_models=1)], Demand("a", rate=1.0, waiting=9), Demand("b"))
    assert not hurries([host("n1", max_models=1)], Demand("a", rate=1.0, waiting=1, oldest=9.0)), "it loads now"
    waits = Demand("b", rate=0.1, waiting=1, oldest=0.5)
    assert hurries([host("n1", "a", max_models=1, since=0.0)], Demand("a", rate=1.0), waits), "for its turn"
    waits.oldest = 60.0
    assert hurries([host("n1", "a", max_models=1)], Demand("a"), waits), "for room that is being made"
    drains = host("n1", "a", max_models=1)
    drains.places["a"].state, drains.places["a"].in_use, drains.coming = DRAINING, 1, "b"
    assert hurries([drains], Demand("a"), waits), "for the last request there"


@settings(max_examples=60, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.lists(
        st.tuples(st.floats(0, 120), st.sampled_from(MODELS), st.integers(1, 12000), st.integers(1, 600)),
        min_size=1,
        max_size=120,
    ),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_everybody_is_served_whatever_comes(trace: list[tuple[float, str, int, int]], nodes: int, room: int) -> None:
    """And as soon as may be said: after the backlog of all who came before, and the loads that these need."""
    asked = [Asked(*one) for one in sorted(trace)]
    simulation = Simulation(Shape(nodes=nodes, room=room), MODELS)
    outcome = simulation.run(asked)
    assert len(outcome.first) == len(asked)
    work = sum(one.prompt / 2500 + one.output / 60 for one in asked)
    for request, first in zip(asked, outcome.first, strict=True):
        assert request.prompt / 2500 <= first + 1e-6
        assert first <= 600 + work + 60 * len(MODELS)
    assert all(len(one.places) <= room for one in simulation.hosts)


def test_a_model_that_is_asked_for_more_gets_more_copies() -> None:
    asked = [Asked(at / 2, "a", 1000, 240) for at in range(600)] + [Asked(at * 30.0, "b", 100, 60) for at in range(10)]
    simulation = Simulation(Shape(nodes=4, room=1), ("a", "b"))
    simulation.run(sorted(asked, key=lambda one: one.at))
    assert simulation.ledger.slots("a") == 12 and simulation.ledger.slots("b") == 4
    assert simulation.outcome.loads <= 6, "and then nothing moves"


def test_the_wait_is_that_of_erlangs_formula() -> None:
    """Two callers on average at three slots: 4/9 of them wait (tables of Erlang C)."""
    assert wait(3, 2.0, 6.0) == pytest.approx(4 / 9 * 6.0)
    assert wait(1, 0.5, 1.0) == pytest.approx(1.0), "M/M/1"


@given(st.floats(0, 10), st.integers(0, 40), st.floats(0.1, 30), st.floats(0, 60), st.integers(0, 8))
def test_another_copy_never_makes_callers_wait_longer(
    rate: float, waiting: int, seconds: float, load: float, copies: int
) -> None:
    slots = 4 * copies
    assert cost(rate, waiting, seconds, load, slots + 4) <= cost(rate, waiting, seconds, load, slots) + 1e-9


def test_rates_are_those_of_the_last_minutes_and_rushes_are_seen_at_once() -> None:
    rate = Rate(0.0)
    for at in range(1000):
        rate.note(float(at))
    assert rate.value(1000.0) == pytest.approx(1.0, rel=0.05)
    assert rate.value(1300.0) == pytest.approx(math.exp(-1), rel=0.05)
    for _ in range(300):
        rate.note(1300.0)
    assert rate.value(1300.0) == pytest.approx(6.0, rel=0.05)


def test_what_was_asked_once_is_asked_by_nobody_in_the_end() -> None:
    """And what such a rate costs with a load of ten minutes moves nothing."""
    rate = Rate(0.0)
    rate.note(0.0)
    assert rate.value(1800.0) > NOBODY and rate.value(3000.0) == 0.0
    assert cost(NOBODY, 0, 600.0, 600.0, 0) < WORTH


def test_a_mean_begins_with_what_is_measured() -> None:
    mean = Mean(4.0)
    mean.note(10.0)
    assert mean.value == 10.0
    for _ in range(200):
        mean.note(2.0)
    assert mean.value == pytest.approx(2.0, abs=0.05)
