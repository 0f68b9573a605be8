"""What a gateway finds out of nodes while control says nothing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping

import httpx
import pytest

from corral.fleet.catalogue import OWN
from corral.fleet.node import NodeState
from corral.gateway.probe import Probe
from corral.gateway.snapshot import HEARD, Snapshot
from corral.store.answers import LIMIT

MODEL = "m:latest"
READY, DOWN, DRAINING = NodeState.READY, NodeState.DOWN, NodeState.DRAINING
Answers = Mapping[str, list[str] | httpx.Response]
"""What is in a node's memory, or all of its answer; a node that is not among them is away."""


def fleet(**states: NodeState) -> Snapshot:
    """Nodes that hold a model, as a control that is away said last."""
    snapshot = Snapshot({})
    tags = [{"name": MODEL}]
    nodes = [
        {"name": name, "url": "http://n", "slots": 1, "state": state, "tags": tags} for name, state in states.items()
    ]
    snapshot.apply({"version": "1", "keys": [], "nodes": nodes})
    snapshot.heard = time.monotonic() - HEARD - 1
    return snapshot


def look(snapshot: Snapshot, *rounds: Answers, meanwhile: Callable[[], None] = lambda: None) -> list[str]:
    """Look once for each round of answers; the nodes that were asked."""
    asked: list[str] = []
    probe = Probe(snapshot, "http://haproxy")

    async def all_rounds() -> None:
        for answers in rounds:

            def node(request: httpx.Request, answers: Answers = answers) -> httpx.Response:
                assert request.url.path == "/api/ps"
                name = request.headers["X-Corral-Node"]
                asked.append(name)
                meanwhile()
                if name not in answers:
                    return httpx.Response(503, headers={"X-Corral-Proxy": "node"})
                found = answers[name]
                if not isinstance(found, httpx.Response):
                    found = httpx.Response(200, json={"models": [{"name": model} for model in found]})
                return httpx.Response(found.status_code, stream=httpx.ByteStream(found.content))

            async with httpx.AsyncClient(transport=httpx.MockTransport(node)) as client:
                await probe.look(client)

    asyncio.run(all_rounds())
    return asked


def states(snapshot: Snapshot) -> list[NodeState]:
    return [node.state for node in snapshot.nodes.values()]


def test_as_long_as_control_is_heard_nobody_is_asked() -> None:
    snapshot = fleet(a=DOWN)
    snapshot.heard = time.monotonic()
    assert look(snapshot, {"a": []}) == []
    assert states(snapshot) == [DOWN]


def test_one_that_control_called_down_is_back_once_it_answers_twice() -> None:
    snapshot = fleet(a=DOWN, b=NodeState.SUSPECT)
    assert snapshot.pool("").ready == frozenset()
    look(snapshot, {"a": [MODEL]})
    assert states(snapshot) == [DOWN, NodeState.SUSPECT], "once may be a chance"
    look(snapshot, {"a": [MODEL]}, {"a": [MODEL]})
    assert states(snapshot) == [READY, DOWN]
    assert snapshot.nodes["a"].resident == {MODEL}
    assert snapshot.pool("").ready == {MODEL}
    assert snapshot.version != "1", "control's next answer has to be all of it"
    snapshot.apply({"version": "1", "keys": [], "nodes": [{"name": "a", "url": "http://n", "state": "down"}]})
    assert states(snapshot) == [DOWN]


def test_what_came_into_memory_is_known_and_what_is_as_before_is_no_news() -> None:
    snapshot = fleet(a=READY)
    look(snapshot, {"a": [MODEL]})
    version = snapshot.version
    assert (version != "1", snapshot.nodes["a"].resident) == (True, {MODEL})
    look(snapshot, {"a": [MODEL]})
    assert snapshot.version == version


def test_one_that_misses_two_answers_in_a_row_gets_no_work() -> None:
    snapshot = fleet(a=READY, b=READY)
    look(snapshot, {"b": []}, {"a": [], "b": []}, {"b": []})
    assert states(snapshot) == [READY, READY]
    look(snapshot, {"b": []}, {"b": []})
    assert states(snapshot) == [DOWN, READY]
    assert snapshot.version != "1"


def test_where_more_than_half_are_silent_nobody_is_believed_to_be_down() -> None:
    snapshot = fleet(a=READY, b=READY, c=DOWN)
    look(snapshot, {"b": []}, {"b": []}, {"b": []})
    assert states(snapshot) == [READY, READY, DOWN]
    assert snapshot.version == "1"


def test_one_that_is_drained_stays_so() -> None:
    snapshot = fleet(a=DRAINING, b=READY)
    assert look(snapshot, {"a": [], "b": []}, {"b": []}) == ["b", "b"]
    assert states(snapshot) == [DRAINING, READY]


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(503, text="no server"),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json={"models": "none"}),
        httpx.Response(200, json={"models": [{"model": MODEL}]}),
        httpx.Response(200, content=b" " * (LIMIT + 1)),
        httpx.Response(200, content=b"[" * 100_000),
        httpx.Response(200, content=json.dumps({"models": [{"name": "é"}]}, ensure_ascii=False).encode("latin-1")),
    ],
    ids=["status", "no JSON", "no list", "no name", "large", "deep", "no UTF-8"],
)
def test_nonsense_says_nothing(answer: httpx.Response) -> None:
    snapshot = fleet(a=READY, b=READY, c=DOWN)
    rounds = [{"a": answer, "b": [], "c": answer}] * 3
    look(snapshot, *rounds)
    assert states(snapshot) == [READY, READY, DOWN]
    assert snapshot.version == "1"


def test_models_of_corral_itself_are_nobody_s_business() -> None:
    snapshot = fleet(a=READY)
    look(snapshot, {"a": [MODEL, f"{OWN}kept/m:latest"]})
    assert snapshot.nodes["a"].resident == {MODEL}


def test_each_judgement_is_another_version_and_none_grows() -> None:
    snapshot = fleet(a=READY)
    seen = set()
    for number in range(1000):
        look(snapshot, {"a": [MODEL] if number % 2 else []})
        seen.add(snapshot.version)
    assert len(seen) > 900 and max(map(len, seen)) < 8


def test_what_control_says_while_nodes_are_asked_counts() -> None:
    snapshot = fleet(a=DOWN)

    def heard() -> None:
        snapshot.heard = time.monotonic()

    assert look(snapshot, {"a": [MODEL]}, meanwhile=heard) == ["a"]
    assert (states(snapshot), snapshot.version) == ([DOWN], "1")
