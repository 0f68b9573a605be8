"""benchmarks/fleet: what it compares with does what it is said to do, and its plot is an SVG."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from balancers import Balanced, Choice, least_connections, residency, round_robin  # noqa: E402
from fleet import CASES, asked, plot  # noqa: E402

from corral.fleet.simulation import Asked, Outcome, Shape, Simulation  # noqa: E402

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
    assert first == pytest.approx([9.0, 11.0, 20.0], abs=1.0)


def test_a_conversation_of_the_trace_keeps_its_model() -> None:
    case = next(case for case in CASES if case.trace == "mooncake")
    models: dict[int, str] = {}
    _, requests = asked(case, 0)
    for one in requests[:2000]:
        if len(one.blocks) > 1:
            assert models.setdefault(one.blocks[1], one.model) == one.model


def test_the_plot_is_an_svg() -> None:
    outcome = Outcome(first=[0.1, 0.5, 2.0, 300.0])
    root = ElementTree.fromstring(plot("A & B".replace("&", "and"), [("one", outcome), ("two", outcome)]))
    assert root.tag.endswith("svg") and "two" in "".join(root.itertext())
