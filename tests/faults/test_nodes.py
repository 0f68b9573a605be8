"""A node that dies, hangs or fails: what its requests come to, and that it is used again."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.fleet import QUICK, Fleet
from support.load import CHAT, PROMPT, TOLD, WHOLE, Answer, Load, after
from support.process import until

from corral.gateway.health import FAILED

EJECTED_WITHIN = 10.0
SETTLED_WITHIN = 5.0
EJECTIONS = "corral_ejections_total"
BUFFER = 64 << 10
"""Bytes that a proxy can send again; what is larger, the gateway alone can."""
CALLERS = 8
ENOUGH = 100 * CALLERS * FAILED
"""Requests of which those that may meet a runner before it is ejected are no more than 1%: a gateway that saw one fail
leaves the node alone for 2 s, and each caller has one request at a time."""
MANY = 12
"""Kills at most until some of the large ones were on a node that died."""


def prompts() -> list[str]:
    """Of sixteen callers, one in four has a large one: a word as long is one token, so none takes longer to read."""
    made = [PROMPT] * 16
    for at, size in ((3, 20_000), (7, 45_000), (11, 70_000), (15, 100_000)):
        made[at] = f"{PROMPT} {'x' * size}"
    return made


@pytest.fixture(autouse=True)
def mended(fleet: Fleet) -> Iterator[None]:
    """Whatever a test did to node-1, it is over."""
    yield
    node = fleet.nodes["node-1"]
    node.kill()
    node.start()
    fleet.warm()


def no_request_is_lost(load: Load) -> None:
    """Each was answered whole, or told in its API's words that the answer it had begun to get ends here."""
    assert load.unlike(WHOLE, TOLD) == []
    told = [answer for answer in load.answers if answer.fate == TOLD]
    assert [str(answer) for answer in told if not answer.text] == [], "told before a first token: that one is retried"
    for asked in {(answer.path, answer.sent) for answer in load.answers}:
        # The simulated model is exact: a retry that repeated or mixed anything would show.
        assert len({a.text for a in load.answers if (a.path, a.sent) == asked and a.fate == WHOLE}) == 1


def test_a_killed_node_loses_nothing_and_is_used_again(fleet: Fleet, matrix: Callable[[str, str, str], None]) -> None:
    node = fleet.nodes["node-1"]
    with fleet.load(name="killed") as load:
        load.more(20, "node-1")
        node.kill()
        killed = time.monotonic()
        load.until(lambda _: time.monotonic() > killed + SETTLED_WITHIN + 2, "the fleet has settled")
        node.start()
        # It comes back cold, and is used for a model once that is in its memory.
        fleet.all_ready()
        load.more(40)
        cold = time.monotonic()
        fleet.warm()
        load.more(10, "node-1")
    no_request_is_lost(load)
    assert load.fates[TOLD] <= 16
    assert any(answer.attempts > 1 for answer in load.answers), "nothing was on the node when it died"
    later = [a for a in load.answers if a.began > killed + SETTLED_WITHIN]
    assert later
    assert [str(answer) for answer in later if answer.fate != WHOLE] == []
    assert {a.node for a in after(load.answers, killed)} == {"node-1", "node-2"}
    meanwhile = [a for a in load.answers if a.began > killed + SETTLED_WITHIN and a.ended < cold]
    assert meanwhile and {a.node for a in meanwhile} == {"node-2"}
    matrix("node comes back cold", "used for a model once /api/ps shows it", f"0 of {len(meanwhile)} on it before")


def test_800_requests_under_node_kills_lose_none(fleet: Fleet, matrix: Callable[[str, str, str], None]) -> None:
    kills = 0

    def large() -> list[Answer]:
        """Those that a proxy could not have sent again, and that two nodes were asked for before a token came."""
        return [answer for answer in list(load.answers) if answer.attempts > 1 and answer.sent > BUFFER]

    with fleet.load(name="kills", prompts=prompts()) as load:
        load.more(20, "node-1")
        while len(load.answers) < 800 or (not large() and kills < MANY):
            name = f"node-{kills % 2 + 1}"
            fleet.nodes[name].kill()
            kills += 1
            killed = time.monotonic()
            load.until(lambda _, at=killed: time.monotonic() > at + 1.5, "the fleet has settled")  # type: ignore[misc]
            fleet.nodes[name].start()
            fleet.warm()
            load.more(8, name)
    no_request_is_lost(load)
    assert kills >= 3
    moved = sum(answer.attempts > 1 for answer in load.answers)
    gone_on = sum(b'"continued"' in answer.body for answer in load.answers)
    assert moved
    assert large(), "no large one was on a node that died"
    told = load.fates[TOLD]
    sizes = sorted({answer.sent >> 10 for answer in load.answers})
    measured = (
        f"{len(load.answers)} requests of up to {sizes[-1]} KiB, {kills} kills: 0 lost, {moved} retried "
        f"({len(large())} of them above {BUFFER >> 10} KiB), {gone_on} gone on with, {told} told"
    )
    matrix("nodes killed under load", "0 of 800 lost before the first token", measured)


def test_a_hung_node_is_given_up_and_ejected(fleet: Fleet) -> None:
    node = fleet.nodes["node-1"]
    with fleet.load(name="hung") as load:
        load.more(20, "node-1")
        node.process.send(signal.SIGSTOP)
        hung = time.monotonic()
        try:
            load.until(lambda _: time.monotonic() > hung + EJECTED_WITHIN, "it is ejected")
            ejected = load.more(40)
        finally:
            node.process.send(signal.SIGCONT)
        load.more(10, "node-1")
    no_request_is_lost(load)
    assert any(answer.attempts > 1 for answer in load.answers)
    late = [a for a in load.answers if hung + EJECTED_WITHIN < a.began and a.ended < ejected]
    assert {(answer.node, answer.attempts) for answer in late} == {("node-2", 1)}


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ("fails at once (500)", {"kind": "fail", "status": 500}),
        ("fails at once (503)", {"kind": "fail", "status": 503}),
        ("answers with nonsense", {"kind": "nonsense", "after_tokens": 0}),
        ("ends without `done`", {"kind": "no_done", "after_tokens": 0}),
        ("answers with what is no HTTP", {"kind": "no_http"}),
        ("answers with endless headers", {"kind": "endless_head", "delay": 0.01}),
        ("closes before it answers", {"kind": "cut_after", "after_tokens": 0}),
    ],
)
def test_a_node_that_fails_at_once_attracts_no_requests(
    fleet: Fleet, what: str, fault: dict[str, Any], matrix: Callable[[str, str, str], None]
) -> None:
    node, before = fleet.nodes["node-1"], fleet.sum_of(EJECTIONS)
    with fleet.load(QUICK, clients=CALLERS, paths=[CHAT], tokens=[4], name=f"fails-{len(what)}") as load:
        load.more(20, "node-1")
        node.fault(**fault)
        failing = time.monotonic()
        load.until(lambda _: fleet.sum_of(EJECTIONS) >= before + 2, "both gateways have ejected it")
        ejected = time.monotonic()
        until(lambda: "gateway-1, gateway-2" in fleet.reasons()["node-1"], "control has heard of both")
        listed = fleet.states()["node-1"], fleet.reasons()["node-1"]
        load.until(lambda _: time.monotonic() > ejected + 3, "it has failed for a while")
        load.until(lambda got: sum(one.began > failing for one in got) >= ENOUGH, f"{ENOUGH} requests while it fails")
        well = time.monotonic()
        node.well()
        load.more(10, "node-1")
    assert load.unlike(WHOLE) == []
    assert listed[0] == "suspect" and f"{QUICK} gives no tokens there, says gateway-1, gateway-2" in listed[1]
    during = [answer for answer in load.answers if failing < answer.began < well]
    met = [answer for answer in during if answer.attempts > 1]
    assert met
    assert len(met) <= len(during) / 100, f"{len(met)} of {len(during)}"
    late = [answer for answer in during if answer.began > ejected]
    assert {(answer.node, answer.attempts) for answer in late} == {("node-2", 1)}
    until(lambda: set(fleet.states().values()) == {"ready"}, "it is suspect no more")
    seen = f"{len(met)} of {len(during)} met it, each answered elsewhere; ejected after {ejected - failing:.1f} s"
    matrix(f"a node {what}", "ejected; <= 1% of requests see it", seen)
