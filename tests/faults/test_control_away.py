"""Control is away and nobody leads: what gateways and HAProxy see by themselves is all that keeps requests from a node
that dies. Once control is back it knows what it had found of the models."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from support.fleet import MODEL, Fleet
from support.leader import Leader
from support.load import CHAT, TOLD, WHOLE, Answer, body_of
from support.process import until
from support.servers import answers

from corral.gateway.probe import EVERY
from corral.gateway.snapshot import HEARD
from corral.store.keeper import LEADER

SETTLED_WITHIN = 1.0
"""Seconds after which a dead node is met by now and then one request alone, that finds out whether it is back."""
SHUNNED = 2.0
"""For so long (seconds) a gateway leaves a node alone that it could not reach."""
FOUND_WITHIN = HEARD + 2 * EVERY + 1.0
"""Seconds after which gateways know by themselves that a node is away, or is back."""
AWAY = FOUND_WITHIN + 2.0
SLOTS = 4
"""Of a node in the fleet that is contended (conftest.py)."""
TOKENS, CUT, CUTS = (200, 180, 160, 140), 30, 4
"""Of answers, up to five seconds long; those after which they are cut; how many are."""
AT_ONCE = 3
"""A gateway's requests that may have been sent there by the time that the first of them comes back."""


def test_a_node_dies_while_control_is_away(fleet: Fleet, matrix: Callable[[str, str, str], None]) -> None:
    node, store = fleet.nodes["node-1"], Leader(fleet.valkey.url)
    control = fleet.stack.corral("status")["control"]["pid"]
    try:
        with fleet.unsupervised(), fleet.load(name="leaderless", fresh=True) as load:
            load.more(20, "node-1")
            os.kill(control, signal.SIGKILL)
            load.until(lambda _: store.ask(b"GET", LEADER) is None, "nobody is believed to lead")
            alone = load.more(20, "node-1")
            node.kill()
            killed = time.monotonic()
            load.until(lambda _: time.monotonic() > killed + AWAY, "the node is dead for a while")
            over = load.more(20, "node-2")
        until(lambda: store.ask(b"GET", LEADER) is not None, "control is back, and leads", 120)
        until(lambda: answers(fleet.stack.url + "/docs"), "the edge reaches it", 60)
        # The first of its tokens was to come: another node gives it. Later: the caller is told, or another goes on.
        assert load.unlike(WHOLE, TOLD) == []
        told = [answer for answer in load.answers if answer.fate == TOLD]
        assert [str(answer) for answer in told if not answer.text] == []
        assert [str(answer) for answer in told if not alone < answer.ended < killed + SETTLED_WITHIN] == []
        assert any(answer.attempts > 1 for answer in load.answers if answer.ended > killed), "nothing was on the node"
        later = [answer for answer in load.answers if killed + SETTLED_WITHIN < answer.began < over]
        assert later and {answer.node for answer in later} == {"node-2"}
        met = sum(answer.attempts - 1 for answer in later)
        bar = f"0 lost before the first token; a second later <= {AT_ONCE} of a gateway meet it each {SHUNNED:g} s"
        seen = f"0 of {len(load.answers)}, {len(told)} told; {met} of the next {len(later)}, in {over - killed:.0f} s"
        matrix("node killed (-9) while control is away", bar, seen)
        assert met <= int((over - killed) / SHUNNED + 1) * AT_ONCE * 2
        late = [answer for answer in later if answer.began > killed + FOUND_WITHIN]
        assert late and {answer.attempts for answer in late} == {1}, "by then it is known to be down"
        # What was answered meanwhile waited in the spools.
        assert {record["node"] for record in fleet.records(*(answer.request_id for answer in later))} == {"node-2"}
        node.start()
        fleet.warm()
        fleet.all_ready()
        with fleet.load(name="led", fresh=True) as load:
            load.more(10, "node-1")
        assert load.unlike(WHOLE) == []
        assert {answer.attempts for answer in load.answers} == {1}
    finally:
        node.kill()
        node.start()
        fleet.warm()


def test_a_node_comes_back_while_control_is_away(fleet: Fleet, matrix: Callable[[str, str, str], None]) -> None:
    back, other, store = fleet.nodes["node-1"], fleet.nodes["node-2"], Leader(fleet.valkey.url)
    control = fleet.stack.corral("status")["control"]["pid"]
    back.kill()
    try:
        until(lambda: fleet.states()["node-1"] == "down", "control calls it down", every=0.3)
        with fleet.unsupervised():
            os.kill(control, signal.SIGKILL)
            until(lambda: store.ask(b"GET", LEADER) is None, "nobody is believed to lead")
            back.start()
            other.kill()
            began = time.monotonic()
            client = fleet.client()
            until(lambda: client.ask(CHAT, body_of(CHAT, MODEL, 1), "back").fate == WHOLE, "it is used again")
            found = time.monotonic() - began
            client.close()
            with fleet.load(name="alone", fresh=True) as load:
                load.more(40)
        until(lambda: store.ask(b"GET", LEADER) is not None, "control is back, and leads", 120)
        until(lambda: answers(fleet.stack.url + "/docs"), "the edge reaches it", 60)
        assert load.unlike(WHOLE) == []
        assert {answer.node for answer in load.answers} == {"node-1"}
        bar = f"the only node that is left is used <= {FOUND_WITHIN:g} s after it came back"
        matrix("node comes back, the other dies, while control is away", bar, f"after {found:.1f} s")
        assert found <= FOUND_WITHIN
    finally:
        for node in (back, other):
            node.kill()
            node.start()
        fleet.warm()
        fleet.all_ready()


def test_a_restart_of_control_while_all_slots_are_used_costs_no_continuation(
    contended: Fleet, matrix: Callable[[str, str, str], None]
) -> None:
    """Nothing can be tried anew meanwhile: there is no slot for it."""
    nodes, store = contended.nodes, Leader(contended.valkey.url)
    control = contended.stack.corral("status")["control"]["pid"]

    def full() -> bool:
        return all(node.work()["running"] == SLOTS for node in nodes.values())

    with contended.load(clients=3 * SLOTS, paths=[CHAT], tokens=TOKENS, name="full", fresh=True) as load:
        load.until(lambda _: full(), "all slots are used")
        os.kill(control, signal.SIGKILL)
        load.until(lambda _: store.ask(b"GET", LEADER) is None, "nobody is believed to lead")
        load.until(lambda _: store.ask(b"GET", LEADER) is not None, "control is back, and leads")
        contended.all_ready()
        load.until(lambda _: full(), "all slots are still used")
        nodes["node-1"].fault(kind="cut_after", after_tokens=CUT, count=CUTS, model=MODEL)
        load.until(lambda answers: len(_cut(answers)) > CUTS // 2, "streams were cut")
        load.more(2 * SLOTS)
    met = _cut(load.answers)
    went_on = [answer for answer in met if answer.fate == WHOLE]
    bar = "each stream that its node leaves then is gone on with"
    matrix("control killed (-9) while all slots are used", bar, f"{len(went_on)} of {len(met)}")
    assert load.unlike(WHOLE) == []
    assert {answer.node for answer in went_on} == {"node-1"}


def _cut(answers: list[Answer]) -> list[Answer]:
    """Those that their node left: of the faults the canary may have met one."""
    return [answer for answer in answers if answer.fate == TOLD or b'"continued"' in answer.body]
