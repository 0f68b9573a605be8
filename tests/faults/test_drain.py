"""Nodes come and go under load, and no request notices."""

from __future__ import annotations

import time
from collections.abc import Callable

from support.fleet import Fleet
from support.load import WHOLE, Answer, Load, after

SHORT = 6
LENGTHS = [200, SHORT, SHORT, SHORT, 260, SHORT, SHORT, SHORT, 320, SHORT, SHORT, SHORT, 380, SHORT, SHORT, SHORT]
"""Tokens of each caller's answers: the long ones take five seconds and more, and never run in step."""


def a_long_one_began(load: Load, node: str = "") -> None:
    """Wait for a long stream (on ``node``) that has seconds to go."""

    def found(_: list[Answer]) -> bool:
        fresh = [answer for answer in list(load.streaming.values()) if time.monotonic() - answer.first < 1.0]
        numbers = [int(answer.request_id.split("-")[1]) for answer in fresh if not node or answer.node == node]
        return any(LENGTHS[number % len(LENGTHS)] > SHORT for number in numbers)

    load.until(found, f"a long stream begins on {node or 'any node'}")


def span(answers: list[Answer], moment: float) -> list[Answer]:
    """The streams that ran at a moment."""
    return [answer for answer in answers if answer.first and answer.first < moment < answer.ended]


def test_add_drain_resume_and_remove_drop_no_request_and_cut_no_stream(
    fleet: Fleet, matrix: Callable[[str, str, str], None]
) -> None:
    extra = fleet.node("node-3")
    fleet.warm()
    reloads: list[float] = []
    try:
        with fleet.load(tokens=LENGTHS, name="drain") as load:
            load.more(20, "node-1")
            a_long_one_began(load)
            fleet.stack.corral("nodes", "add", extra.url, "--name", "node-3")
            reloads.append(time.monotonic())
            load.more(10, "node-3")

            a_long_one_began(load, "node-1")
            asked = time.monotonic()
            drained = fleet.stack.corral("nodes", "drain", "node-1", "--wait")
            # By the node itself: the end of an answer may be on its way to its caller when its node has none any more.
            fleet.nodes["node-1"].count_anew()
            assert (drained["drained"], drained["streams"]) == (True, 0)
            assert fleet.states()["node-1"] == "draining"
            load.more(60)
            ran, resumed = fleet.nodes["node-1"].work()["most"], time.monotonic()
            fleet.stack.corral("nodes", "resume", "node-1")
            load.more(10, "node-1")

            a_long_one_began(load)
            fleet.stack.corral("nodes", "remove", "node-3")
            reloads.append(time.monotonic())
            load.more(60)
    finally:
        if fleet.states()["node-1"] == "draining":
            fleet.stack.corral("nodes", "resume", "node-1")
        if "node-3" in fleet.states():
            fleet.stack.corral("nodes", "remove", "node-3")
        fleet.nodes.pop("node-3")
        extra.kill()
    assert load.unlike(WHOLE) == []
    matrix("nodes added, drained, removed under load", "0 streams cut", f"0 of {len(load.answers)}")
    # A connection that was in use while HAProxy reloaded still ends at its old worker, which knows no new node: that
    # is no fault of the node's, and no second attempt.
    assert [str(answer) for answer in load.answers if answer.attempts != 1] == []
    assert all(span(load.answers, moment) for moment in reloads), "a stream ran across each reload"

    on_first = [answer for answer in load.answers if answer.node == "node-1"]
    assert any(answer.began < asked and answer.ended - asked > 0.5 for answer in on_first), "drain had to wait"
    assert ran == 0, "it was said to be drained"
    assert [str(a) for a in after(load.answers, reloads[1], "node-3")] == []
    assert after(load.answers, resumed, "node-1")
