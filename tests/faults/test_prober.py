"""Control does not hear its nodes: its own network is gone, or more of them are than may be put out of use at once."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator

import httpx
import pytest
from support.fleet import MODEL, Fleet
from support.fleet import fleet as run_fleet
from support.late import lateness
from support.links import Namespace, RemoteNode, namespace
from support.load import CHAT, TOLD, WHOLE, body_of
from support.process import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
Matrix = Callable[[str, str, str], None]

ASKED = ("/api/ps", "/api/tags")
"""What control asks of nodes, and nobody else does."""
SPARED = "corral_nodes_spared"
EJECTED = "corral_ejections_total"


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, Namespace]]:
    """A fleet of four nodes in a network of their own."""
    folder = tmp_path_factory.mktemp("four")
    with namespace() as network:
        nodes = [RemoteNode(f"node-{number}", folder, network) for number in range(1, 5)]
        with run_fleet(folder, "3s", nodes=nodes) as made:
            made.stack.until_continued(MODEL)
            yield made, network
        for node in nodes:
            node.kill()


@pytest.mark.parametrize("lost", [1, 2, 4])
def test_the_prober_s_own_network_is_gone(four: tuple[Fleet, Namespace], matrix: Matrix, lost: int) -> None:
    fleet, network = four
    fleet.all_ready()
    seen: set[str] = set()
    before: set[str] = set()
    ejections = fleet.sum_of(EJECTED)

    def missed(_: object) -> bool:
        before.update(fleet.states().values())
        return fleet.control_says(SPARED) == lost

    with fleet.load(clients=8, paths=[CHAT], tokens=[20], name=f"prober-{lost}", fresh=True) as load:
        load.more(16)
        ports = [node.port for node in list(fleet.nodes.values())[:lost]]
        for path in ASKED:
            network.drop_asked(path, *ports)
        try:
            load.until(missed, "control does not hear them")
            since = time.monotonic()
            while time.monotonic() < since + 3:
                seen |= set(fleet.states().values())
                time.sleep(0.1)
            reasons = fleet.reasons()
            used = load.more(40)
        finally:
            network.mend()
        load.until(lambda _: fleet.control_says(SPARED) == 0, "control hears them again")
    fleet.all_ready()
    ejected = fleet.sum_of(EJECTED) - ejections
    assert load.unlike(WHOLE) == []
    assert [str(answer) for answer in load.answers if answer.attempts != 1] == []
    assert ejected == 0
    assert before <= {"suspect", "ready"}, "not for a moment either"
    assert seen == ({"suspect", "ready"} if lost < 4 else {"suspect"})
    assert "HAProxy" in reasons["node-1"] and "no answer within" in reasons["node-1"]
    # Also those that control does not hear are given work.
    assert {answer.node for answer in load.answers if used - 3 < answer.began} == set(fleet.nodes)
    measured = f"{ejected:.0f} ejected, {len(load.answers)} answers at the first attempt"
    matrix(f"the prober's own network gone ({lost} of 4 nodes)", "0 ejections, requests go on", measured)


def test_half_of_the_nodes_fail_at_once(four: tuple[Fleet, Namespace], matrix: Matrix) -> None:
    kill_at_once(four[0], 2, matrix)


def test_more_than_half_of_the_nodes_fail_at_once(four: tuple[Fleet, Namespace], matrix: Matrix) -> None:
    kill_at_once(four[0], 3, matrix)


def kill_at_once(fleet: Fleet, count: int, matrix: Matrix) -> None:
    """Kill nodes under load: half of them may be down, one more is not, and nobody loses an answer."""
    fleet.all_ready()
    killed = list(fleet.nodes.values())[:count]
    most = 0
    ejections = fleet.sum_of(EJECTED)
    with fleet.load(clients=8, paths=[CHAT], tokens=[20], name=f"half-{count}", fresh=True) as load:
        load.more(16)
        for node in killed:
            node.process.send(signal.SIGKILL)
        for node in killed:
            node.kill()
        at = time.monotonic() + 0.5
        load.until(lambda _: list(fleet.states().values()).count("down") == 2, "half of them are down")
        # HAProxy has its word too by now.
        while time.monotonic() < at + 6:
            most = max(most, list(fleet.states().values()).count("down"))
            time.sleep(0.1)
        states, spared = fleet.states(), fleet.control_says(SPARED)
        ejected = fleet.sum_of(EJECTED) - ejections
        load.more(16)
        for node in killed:
            node.start()
        fleet.warm()
        load.more(16)
    fleet.all_ready()
    # Nor does who was on one of them, and then on another that died in the same moment.
    assert load.unlike(WHOLE, TOLD) == []
    assert [str(answer) for answer in load.answers if answer.fate == TOLD and not answer.text] == []
    assert [str(answer) for answer in load.answers if answer.began > at and answer.fate != WHOLE] == []
    assert most == 2
    # Half of them are down: a gateway that asks the dead one beside them for a token keeps it in use too.
    assert ejected == 0
    known = Counter(states.values())
    assert (known["down"], known["suspect"], known["ready"], spared) == (2, count - 2, 4 - count, count - 2)
    moved = sum(answer.attempts > 1 for answer in load.answers)
    out = f"{most} down, {ejected:.0f} ejected, {spared:.0f} spared and alerted"
    measured = f"{out}; {len(load.answers)} requests, {moved} moved, 0 lost"
    matrix(f"{count} of 4 nodes killed at once", "at most half ejected, the rest serves", measured)


def test_when_every_node_is_gone_it_is_said(four: tuple[Fleet, Namespace], matrix: Matrix) -> None:
    fleet = four[0]
    fleet.all_ready()
    for node in fleet.nodes.values():
        node.kill()
    at = time.monotonic()
    try:
        # HAProxy's checks say the same as control's: nobody is spared where nobody is left.
        until(lambda: set(fleet.states().values()) == {"down"}, "all are down")
        until(lambda: httpx.get(fleet.stack.url + "/health/ready").status_code == 503, "gateways have heard")
        took = time.monotonic() - at
        client = fleet.client()
        with lateness() as late:
            answer = client.ask(CHAT, body_of(CHAT, MODEL, 1), "nobody")
        client.close()
        assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1
        assert answer.ended - answer.began < 1 + max(late)
    finally:
        for node in fleet.nodes.values():
            node.start()
        fleet.warm()
    fleet.all_ready()
    matrix("every node gone", "503 with Retry-After, not ready", f"503 at once, not ready after {took:.1f} s")
