"""Which node serves a request."""

from __future__ import annotations

import pytest

from corral.fleet.choose import choose
from corral.fleet.node import Node, NodeState, canonical_name


def node(name: str, *, held: str = "m:latest", resident: str = "", in_flight: int = 0, slots: int = 2) -> Node:
    return Node(
        name,
        f"http://{name}",
        slots,
        held=frozenset(held.split()),
        resident=frozenset(resident.split()),
        in_flight=in_flight,
    )


def name_of(chosen: Node | None) -> str | None:
    return None if chosen is None else chosen.name


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([], None),
        ([node("a", held="x:latest")], None),
        ([node("a"), node("b", resident="m:latest")], "b"),
        ([node("a", in_flight=1), node("b")], "b"),
        ([node("a", resident="m:latest", in_flight=1), node("b")], "a"),
        ([node("a", resident="m:latest", in_flight=2), node("b")], "b"),
        ([node("a", in_flight=3, slots=4), node("b", in_flight=1, slots=1)], "a"),
        ([node("a", in_flight=4), node("b", in_flight=3)], "b"),
    ],
)
def test_the_least_busy_node_that_holds_the_model(nodes: list[Node], expected: str | None) -> None:
    assert name_of(choose(nodes, "m:latest", now=100.0)) == expected


@pytest.mark.parametrize("state", [NodeState.DOWN, NodeState.SUSPECT, NodeState.DRAINING])
def test_only_a_ready_node_is_given_work(state: NodeState) -> None:
    bad = node("a", resident="m:latest")
    bad.state = state
    assert choose([bad], "m:latest", now=0.0) is None
    assert name_of(choose([bad, node("b")], "m:latest", now=0.0)) == "b"


def test_a_model_that_fell_back_to_the_cpu_is_used_where_no_other_is() -> None:
    slow = node("a", resident="m:latest")
    slow.on_cpu = frozenset({"m:latest"})
    busy = node("b", resident="m:latest", in_flight=9)
    assert name_of(choose([slow, busy], "m:latest", now=0.0)) == "b"
    assert name_of(choose([slow], "m:latest", now=0.0)) == "a"
    busy.shunned_until = 9.0
    assert name_of(choose([slow, busy], "m:latest", now=0.0)) == "a"
    slow.on_cpu = frozenset({"other:latest"})
    assert name_of(choose([slow, node("b", resident="m:latest", in_flight=1)], "m:latest", now=0.0)) == "a"


def test_a_node_that_failed_is_the_last_resort() -> None:
    failed = node("a", resident="m:latest")
    failed.shunned_until = 10.0
    other = node("b", in_flight=9)
    assert name_of(choose([failed, other], "m:latest", now=9.0)) == "b"
    assert name_of(choose([failed, other], "m:latest", now=11.0)) == "a"
    assert name_of(choose([failed], "m:latest", now=9.0)) == "a"
    assert name_of(choose([node("a"), other], "m:latest", now=9.0, tried={"a"})) == "b"
    assert name_of(choose([node("b"), failed], "m:latest", now=9.0, tried={"b"})) == "a"


def test_a_name_without_a_tag_is_latest() -> None:
    assert canonical_name("llama3.2") == "llama3.2:latest"
    assert canonical_name("host:5000/a/b") == "host:5000/a/b:latest"
    assert canonical_name("a/b:c") == "a/b:c"


def test_an_update_keeps_what_runs() -> None:
    one = node("a", in_flight=3)
    one.update(
        {
            "name": "a",
            "url": "http://new",
            "slots": 0,
            "state": "draining",
            "version": "0.17.4",
            "tags": [{"name": "x:latest"}],
            "ps": [],
        }
    )
    assert (one.in_flight, one.slots, one.state, one.held) == (3, 1, NodeState.DRAINING, {"x:latest"})
