"""How many models fit a node of which nothing was said: learned as Ollama lets one go for another that comes."""

from __future__ import annotations

from typing import Any

import pytest

from corral.control.placement import FRESH, Placement
from corral.control.prober import Member
from corral.fleet.placement import Demand, Planner
from corral.fleet.slots import PlaceState
from corral.store.demand import Seen

MODELS = ("a:latest", "b:latest", "c:latest")
LONG_AGO = -1000.0


class Fleet:
    """A leader's sight of one node; ``now`` are its seconds."""

    def __init__(self, **said: Any) -> None:
        nothing: Any = None
        self.placement = Placement(nothing, nothing, nothing)
        self.member = Member("n1", "http://n1", up=True, tags=[{"name": name} for name in MODELS], **said)
        self.now = LONG_AGO

    def has(self, *models: str) -> None:
        """The node says what is in its memory, and the leader looks; a second goes by."""
        self.member.ps = [{"name": name} for name in models]
        self.placement.look([self.member], {}, self.now)
        self.now += 1.0

    def loaded(self, model: str) -> None:
        """A load that the leader had begun has ended."""
        self.placement.finished("n1", model, PlaceState.RESIDENT, self.now)

    def steps(self, wanted: str) -> list[tuple[str, str]]:
        """What is decided, much later, when somebody waits for a model."""
        now = self.now + 1000.0
        spots = {model: spot for (_, model), spot in self.placement.spots.items()}
        host = self.placement._host(self.member, set(MODELS), spots, {name: Seen() for name in MODELS})
        demands = {name: Demand(name) for name in MODELS} | {wanted: Demand(wanted, 1.0, 3, 20.0)}
        return [(step.action.value, step.model) for step in Planner([host], demands, now).plan()]


def test_a_model_that_went_as_another_came_tells_how_many_fit() -> None:
    fleet = Fleet()
    fleet.has("a:latest", "b:latest")
    assert fleet.steps("c:latest") == [("load", "c:latest")], "as many as are asked for, until it is known better"
    fleet.loaded("c:latest")
    fleet.has("b:latest", "c:latest")
    # Two fit: a third one would only push out one that is in use, unseen, so that one is drained first.
    ((action, model),) = fleet.steps("a:latest")
    assert action == "drain" and model in ("b:latest", "c:latest")


@pytest.mark.parametrize("came", [False, True])
def test_a_model_that_went_by_itself_tells_nothing(came: bool) -> None:
    """Its time was over, or somebody unloaded it: long after another came, or without one."""
    fleet = Fleet()
    fleet.has("a:latest", "b:latest")
    if came:
        fleet.loaded("c:latest")
        fleet.has("a:latest", "b:latest", "c:latest")
        fleet.now += FRESH
    fleet.has("b:latest", *MODELS[2:] * came)
    assert fleet.steps("a:latest") == [("load", "a:latest")]


def test_what_was_said_of_a_node_holds_whatever_goes() -> None:
    fleet = Fleet(max_models=3)
    fleet.has("a:latest", "b:latest")
    fleet.loaded("c:latest")
    fleet.has("b:latest", "c:latest")
    assert fleet.steps("a:latest") == [("load", "a:latest")]


def test_a_model_that_was_removed_and_stays_in_memory_takes_its_room() -> None:
    """Nothing can unload it: what is learned, or was declared, is without it."""
    fleet = Fleet()
    fleet.has("a:latest", "b:latest")
    fleet.member.tags = [{"name": name} for name in ("a:latest", "c:latest")]
    fleet.loaded("c:latest")
    fleet.has("b:latest", "c:latest")
    ((action, model),) = fleet.steps("a:latest")
    assert (action, model) == ("drain", "c:latest"), "one of ours fits beside it"


def test_a_model_that_was_removed_and_stays_in_memory_takes_its_part_of_what_was_declared() -> None:
    fleet = Fleet(max_models=2, memory=24 << 30)
    fleet.member.tags = [{"name": name} for name in ("a:latest", "c:latest")]
    fleet.has("b:latest", "c:latest")
    fleet.member.ps[0]["size"] = 10 << 30
    host = fleet.placement._host(fleet.member, {"a:latest", "c:latest"}, {}, {})
    assert (host.max_models, host.memory) == (1, 14 << 30)
    fleet.member.ps = []
    host = fleet.placement._host(fleet.member, {"a:latest", "c:latest"}, {}, {})
    assert (host.max_models, host.memory) == (2, 24 << 30)
