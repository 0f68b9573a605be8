"""The leader's plan for large fleets decides as one that asks every node about every model at each step."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.planner import Plain

from corral.fleet import placement
from corral.fleet.placement import MOST, Action, Demand, Host, Planner, Stand
from corral.fleet.slots import PlaceState

LOADING, RESIDENT, DRAINING = PlaceState.LOADING, PlaceState.RESIDENT, PlaceState.DRAINING
MODELS = ("a", "b", "c", "d")
GIB = 1 << 30


def host(name: str, room: int, *resident: str) -> Host:
    """A node that has all models on its disk, and some in memory for long."""
    places = {model: Stand(RESIDENT, -1e6) for model in resident}
    return Host(name, max_models=room, held=frozenset(MODELS), places=places)


MANY = tuple("abcdefg")
kinds = st.builds(
    Host,
    name=st.just(""),
    ready=st.sampled_from((True, True, True, False)),
    memory=st.sampled_from((0, 12 * GIB, 20 * GIB)),
    max_models=st.integers(0, 4),
    slots=st.sampled_from((1, 4, 4)),
    held=st.frozensets(st.sampled_from(MANY), min_size=4),
    places=st.dictionaries(
        # One that nobody knows is among them.
        st.sampled_from((*MANY, "old")),
        st.builds(
            Stand,
            st.sampled_from((RESIDENT,) * 6 + (LOADING, DRAINING)),
            st.sampled_from((0.0, 170.0)),
            st.integers(0, 3),
            st.sampled_from((1, 4, 4)),
        ),
        max_size=4,
    ),
    coming=st.sampled_from(("", "", *MANY)),
)
# Few values, so that there are equals.
wants = st.builds(
    Demand,
    st.just(""),
    rate=st.sampled_from((0.0, 0.0, 1e-6, 0.01, 0.3, 0.3, 2.0, 20.0)),
    waiting=st.sampled_from((0, 0, 1, 9)),
    oldest=st.sampled_from((0.0, 4.0, 12.0, 40.0)),
    seconds=st.sampled_from((1.0, 4.0)),
    load=st.sampled_from((4.0, 10.0, 60.0)),
    size=st.integers(1, 9).map(lambda size: size * GIB),
    copies=st.sampled_from((0, 0, 0, 1, 2)),
    pins=st.frozensets(st.sampled_from(("n0", "n1", "away")), max_size=1),
)


@settings(max_examples=400, suppress_health_check=list(HealthCheck), derandomize=True, deadline=None)
@given(st.lists(kinds, min_size=1, max_size=9), st.lists(wants, min_size=7, max_size=7), st.sampled_from((1, 3, MOST)))
def test_what_is_remembered_and_left_out_changes_no_decision(fleet: list[Host], asked: list[Demand], most: int) -> None:
    """Whoever asks every node about every model at each step decides the same, in the same order and words."""
    for number, one in enumerate(fleet):
        one.name = f"n{number}"
    for name, demand in zip(MANY, asked, strict=True):
        demand.name = name
    models = {demand.name: demand for demand in asked}
    plain, planner = Plain(fleet, models, 200.0), Planner(fleet, models, 200.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "MOST", most)
        found, expected = planner.plan(), plain.plan()
    unloads = sum(step.action is Action.UNLOAD for step in expected)
    assert found == expected[: unloads + most]
    if planner.cut:
        assert len(found) == unloads + most and planner.hurries, "the rest follows soon"
    else:
        assert (planner.notes, planner.hurries) == (plain.notes, plain.hurries)
        assert (planner.slots, planner.copies) == (plain.slots, plain.copies)


@pytest.mark.parametrize("seed", range(12))
def test_nor_does_it_where_many_copies_move_in_one_plan(seed: int) -> None:
    draw = random.Random(seed)
    fleet = [host(f"n{number}", 2, *draw.sample(MODELS, 2)) for number in range(24)]
    models = {name: Demand(name, rate=draw.uniform(0.0, 30.0), waiting=draw.choice((0, 9))) for name in MODELS}
    plain, planner = Plain(fleet, models, 0.0), Planner(fleet, models, 0.0)
    assert planner.plan() == plain.plan()
    assert planner.notes == plain.notes


def test_a_plan_of_a_large_fleet_goes_on_where_the_last_one_was_cut() -> None:
    """And it knows then what was begun: no node begins two things, and each gets something to do."""
    fleet = [host(f"n{number}", 1) for number in range(3 * MOST)]
    asked = Demand("a", rate=1000.0)
    begun: list[str] = []
    while steps := Planner(fleet, {"a": asked}, 0.0).plan():
        assert len(steps) <= MOST
        for step in steps:
            begun.append(step.node)
            fleet[int(step.node[1:])].places["a"] = Stand(LOADING, 0.0)
    assert sorted(begun) == sorted(one.name for one in fleet)
