"""The link to a node: cut, refusing, or only slow."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fleet import Fleet
from support.fleet import fleet as run_fleet
from support.links import RemoteNode, SlowNode, namespace
from support.load import CHAT, WHOLE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
Matrix = Callable[[str, str, str], None]

CONNECT = 2.0
"""Seconds that a connection to a node may take to be made."""


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, RemoteNode]]:
    """A fleet whose first node is in a network of its own."""
    folder = tmp_path_factory.mktemp("far")
    with namespace() as network:
        node = RemoteNode("node-1", folder, network)
        with run_fleet(folder, "3s", node) as made:
            made.stack.until_continued()
            yield made, node
        node.kill()


def test_a_black_hole_costs_nobody_an_answer(far: tuple[Fleet, RemoteNode], matrix: Matrix) -> None:
    fleet, node = far
    fleet.all_ready()
    with fleet.load(clients=8, paths=[CHAT], tokens=[30], name="hole") as load:
        load.more(8, "node-1")
        node.namespace.drop()
        cut = time.monotonic()
        try:
            load.until(lambda _: fleet.states()["node-1"] == "down" and fleet.heard(), "it is known to be gone", 20)
            known = time.monotonic()
            gone = load.more(16, "node-2")
        finally:
            node.namespace.mend()
        load.more(8, "node-1", seconds=20)
    assert load.unlike(WHOLE) == []
    assert len({answer.text for answer in load.answers}) == 1
    # Nobody waits for a connection that does not come for longer than the two seconds of its deadline.
    began = [a for a in load.answers if cut + 0.5 < a.began < gone]
    slowest = max(a.first - a.began for a in began)
    usual = max(a.first - a.began for a in load.answers if a.began < cut - 1)
    late = [a for a in load.answers if known < a.began < gone]
    assert late and {(answer.node, answer.attempts) for answer in late} == {("node-2", 1)}
    seen = f"0 of {len(load.answers)}, slowest first token {slowest:.1f} s, {usual:.1f} s before"
    matrix("black hole (packets dropped)", f"0 lost, connect deadline <= {CONNECT:g} s", seen)
    assert slowest <= CONNECT + usual


def test_connections_that_are_reset_end_no_answer(far: tuple[Fleet, RemoteNode], matrix: Matrix) -> None:
    fleet, node = far
    fleet.all_ready()
    with fleet.load(clients=8, paths=[CHAT], tokens=[30], name="reset") as load:
        load.more(8, "node-1")
        node.namespace.reset()
        cut = time.monotonic()
        try:
            load.until(lambda _: time.monotonic() > cut + 5, "it is known to be gone")
            load.more(16, "node-2")
        finally:
            node.namespace.mend()
        load.more(8, "node-1", seconds=20)
    assert load.unlike(WHOLE) == []
    assert len({answer.text for answer in load.answers}) == 1
    matrix("connections reset", "0 silent truncations", f"0 of {len(load.answers)}, all whole")


def test_a_slow_link_is_no_fault(tmp_path: Path, matrix: Matrix) -> None:
    node = SlowNode("node-1", tmp_path)
    with run_fleet(tmp_path, "20s", node) as fleet:
        with fleet.load(clients=8, paths=[CHAT], tokens=[12], name="slow", fresh=True) as load:
            load.more(30, "node-1", seconds=40)
            states = set(fleet.states().values())
        ejections = fleet.sum_of("corral_ejections_total")
    assert load.unlike(WHOLE) == []
    assert [str(answer) for answer in load.answers if answer.attempts != 1] == []
    assert (states, ejections) == ({"ready"}, 0)
    served = sum(answer.node == "node-1" for answer in load.answers)
    matrix("slow link (300 ms, 5% of pieces 600 ms more)", "0 ejections", f"0, {served} answers over it")
