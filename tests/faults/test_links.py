"""The link to a node: cut, refusing, or only slow."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest
from support.fleet import Fleet
from support.fleet import fleet as run_fleet
from support.late import lateness
from support.links import TUN, Namespace, RemoteNode, SlowNamespace, namespace
from support.load import CHAT, WHOLE, Answer, after

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
Matrix = Callable[[str, str, str], None]
Far = tuple[Fleet, Namespace]

CONNECT = 2.0
"""Seconds that a connection to a node may take to be made."""
ANSWERS = 30
DELAY, LOSS = SlowNamespace.delay, SlowNamespace.loss


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    """A fleet whose first node is in a network of its own. A token is waited for longer than packets that are lost
    again and again take to come."""
    folder = tmp_path_factory.mktemp("far")
    with namespace(SlowNamespace if os.path.exists(TUN) else Namespace) as network:
        node = RemoteNode("node-1", folder, network)
        with run_fleet(folder, "10s", node) as made:
            made.stack.until_continued()
            yield made, network
        node.kill()


def test_a_black_hole_costs_nobody_an_answer(far: Far, matrix: Matrix) -> None:
    fleet, link = far
    fleet.all_ready()
    with lateness() as woken, fleet.load(clients=8, paths=[CHAT], tokens=[30], name="hole") as load:
        load.more(8, "node-1")
        woken.clear()
        link.drop()
        cut = time.monotonic()
        try:
            load.until(lambda _: fleet.states()["node-1"] == "down" and fleet.heard(), "it is known to be gone")
            known = time.monotonic()
            gone = load.more(16, "node-2")
            halted = max(woken)
        finally:
            link.mend()
        load.more(8, "node-1")
    assert load.unlike(WHOLE) == []
    assert len({answer.text for answer in load.answers}) == 1
    # Nobody waits for a connection that does not come for longer than the two seconds of its deadline, and what the
    # machine adds.
    began = [a for a in load.answers if cut + 0.5 < a.began < gone]
    slowest = max(a.first - a.began for a in began)
    usual = max(a.first - a.began for a in load.answers if a.began < cut - 1)
    late = [a for a in load.answers if known < a.began < gone]
    assert late and {(answer.node, answer.attempts) for answer in late} == {("node-2", 1)}
    seen = f"0 of {len(load.answers)}, slowest first token {slowest:.1f} s, {usual:.1f} s before, "
    seen += f"woken up to {halted * 1e3:.0f} ms late"
    bar = f"0 lost, connect deadline <= {CONNECT:g} s, and how late its callers' process is woken at most"
    matrix("black hole (packets dropped)", bar, seen)
    assert slowest <= CONNECT + usual + halted


def test_connections_that_are_reset_end_no_answer(far: Far, matrix: Matrix) -> None:
    fleet, link = far
    fleet.all_ready()
    with fleet.load(clients=8, paths=[CHAT], tokens=[30], name="reset") as load:
        load.more(8, "node-1")
        link.reset()
        cut = time.monotonic()
        try:
            load.until(lambda _: time.monotonic() > cut + 5, "it is known to be gone")
            load.more(16, "node-2")
        finally:
            link.mend()
        load.more(8, "node-1")
    assert load.unlike(WHOLE) == []
    assert len({answer.text for answer in load.answers}) == 1
    matrix("connections reset", "0 silent truncations", f"0 of {len(load.answers)}, all whole")


def test_a_slow_link_is_no_fault(far: Far, matrix: Matrix) -> None:
    fleet, link = far
    if not isinstance(link, SlowNamespace):
        pytest.skip(f"a slow link needs {TUN}")
    fleet.all_ready()
    seen = set[str]()
    ejections = fleet.sum_of("corral_ejections_total")
    with fleet.load(clients=8, paths=[CHAT], tokens=[12], name="slow", fresh=True) as load:
        link.worsen()
        since = time.monotonic()
        try:

            def answered(answers: list[Answer]) -> bool:
                seen.update(fleet.states().values())
                return "down" in seen or len(after(answers, since, "node-1")) >= ANSWERS

            load.until(answered, f"{ANSWERS} answers over it")
        finally:
            link.mend()
    ejected = fleet.sum_of("corral_ejections_total") - ejections
    assert load.unlike(WHOLE) == []
    # What nobody ejected may still have been doubted: control then has HAProxy's word that it is there.
    assert (ejected, seen - {"suspect"}) == (0, {"ready"})
    assert link.lost > 0
    over = [answer for answer in load.answers if answer.began > since]
    again = sum(answer.attempts > 1 for answer in over)
    fault = f"slow link ({DELAY * 1e3:g} ms each way, {LOSS:.0%} of the node's packets lost)"
    packets = f"{link.lost} of {link.sent} packets lost"
    served = len(after(over, since, "node-1"))
    matrix(fault, "0 ejections", f"{ejected:g}; {served} answers over it, all whole, {again} asked twice; {packets}")
