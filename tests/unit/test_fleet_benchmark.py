"""benchmarks/fleet: what it compares with does what it is said to do, and its plot is an SVG."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from balancers import Balanced, Choice, least_connections, residency, round_robin  # noqa: E402
from fleet import CASES, asked  # noqa: E402
from fleet_dispatch import KEYS, Wired  # noqa: E402
from fleet_played import Played, piece  # noqa: E402
from fleet_played import asked as asked_of  # noqa: E402
from fleet_plot import plot  # noqa: E402
from fleet_simulated import CAP, described, report  # noqa: E402
from support.servers import valkey  # noqa: E402

from corral.fleet.simulation import Asked, Outcome, Shape, Simulation  # noqa: E402
from corral.loadtest import schedule  # noqa: E402
from corral.node import simulated  # noqa: E402

ONE = Shape(nodes=1, room=1, slots=1)


@pytest.mark.parametrize("choose", [round_robin, least_connections, residency])
def test_everybody_is_served(choose: Choice) -> None:
    trace = [Asked(number / 7, f"m{number % 3}", 500, 60) for number in range(200)]
    outcome = Balanced(Shape(nodes=2, room=1), choose).run(trace)
    assert all(first > 0.199 for first in outcome.first) and outcome.loads >= 3


def test_a_node_loads_and_makes_wait_as_ollama_does() -> None:
    trace = [Asked(0.0, "a", 2500, 60), Asked(0.0, "a", 2500, 60), Asked(1.0, "b", 2500, 60)]
    outcome = Balanced(ONE, round_robin).run(trace)
    # A load of 8 s, a prompt of 1 s and an answer of 1 s, one after the other; then another load.
    assert outcome.first == pytest.approx([9.0, 11.0, 20.0])
    assert outcome.loads == 2


def test_corral_takes_the_same_time_where_there_is_no_choice() -> None:
    trace = [Asked(0.0, "a", 2500, 60), Asked(0.0, "a", 2500, 60), Asked(1.0, "b", 2500, 60)]
    first = Simulation(ONE, ("a", "b")).run(trace).first
    assert first == pytest.approx([9.0, 11.0, 20.0], abs=0.3)


def test_a_conversation_of_the_trace_keeps_its_model() -> None:
    case = next(case for case in CASES if case.trace == "mooncake")
    models: dict[int, str] = {}
    _, requests = asked(case, 0)
    for one in requests[:2000]:
        if len(one.blocks) > 1:
            assert models.setdefault(one.blocks[1], one.model) == one.model


def test_the_plot_is_an_svg() -> None:
    first = [0.1, 0.5, 2.0, 300.0]
    root = ElementTree.fromstring(plot("A and B", [("one", first), ("two", first)]))
    assert root.tag.endswith("svg") and "two" in "".join(root.itertext())


def test_a_piece_asks_for_the_same_in_real_time_as_in_discrete_events() -> None:
    load = piece("azure", ["a", "b"], 0.5, 1200.0, 60.0, CAP, 0)
    jobs = list(schedule.jobs(load))
    found = [(one.at, one.model, one.prompt, one.output) for one in asked_of(load)]
    assert found == [(job.due, job.model, job.prompt_tokens, job.max_tokens) for job in jobs]
    assert len(jobs) > 100 and max(one.prompt for one in asked_of(load)) <= CAP < simulated.Profile("a").context


def test_a_simulated_node_is_what_the_discrete_events_take_it_for() -> None:
    shape = Shape(room=1, load=3.0, prefill=100.0, decode=10.0, slots=2)
    made = simulated.load(described(shape, ["a", "b"]))
    assert made.max_loaded == 1 and [one.name for one in made.models] == ["a", "b"]
    first = made.models[0]
    assert (first.load, first.prefill, first.decode, first.slots) == (3.0, 100.0, 10.0, 2)


@pytest.mark.parametrize(("factor", "failed", "agrees"), [(1.1, [], True), (1.3, [], False), (1.0, ["503"], False)])
def test_a_run_in_real_time_agrees_within_a_fifth(factor: float, failed: list[str], agrees: bool) -> None:
    model = Outcome(first=[number / 10 for number in range(1, 101)])
    played = Played([value * factor for value in model.first], [0.0] * 100, failed)
    assert report(model, played, [0.1] * 100) is agrees


@pytest.mark.parametrize("limits", KEYS.values(), ids=KEYS)
def test_a_decision_is_measured_as_it_is_wired(
    limits: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the slot is not asked for in the call of the limits, nobody hears of it, and the run ends.
    monkeypatch.setattr("fleet_dispatch.DECISIONS", 200)
    with valkey(tmp_path) as server:
        slot, ticket, handed = asyncio.run(Wired(server, 10, limits).run())
    for spent in (slot, ticket, handed):
        assert min(spent.gateway, spent.scripts, spent.valkey) > 0
