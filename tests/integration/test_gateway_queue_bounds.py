"""Who waits at a real gateway: in which order, for how long at most, and with how many bytes."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest
from support.gateway import FakeNode, Gateway
from support.held import MODEL, Held, hold, led, placed, queueing
from support.late import lateness
from support.leader import Leader
from support.process import until


@pytest.fixture
def gw(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Gateway]:
    with queueing(tmp_path, *getattr(request, "param", ("30s", 3))) as made:
        yield made


def test_interactive_is_served_before_batch(gw: Gateway, leader: Leader, callers: ThreadPoolExecutor) -> None:
    placed(gw, leader, 1, "node-1")
    batch = gw.new_key(**{"class": "batch"})
    held = Held()
    hold(gw, held)
    runs = callers.submit(gw.post)
    until(lambda: held.running == 1, "one runs")
    last = callers.submit(gw.post, headers={"Authorization": f"Bearer {batch}"})
    until(lambda: leader.waiting() == 1, "a batch waits")
    first = callers.submit(gw.post)
    until(lambda: leader.waiting() == 2, "and one that came later")
    for one, began in ((runs, 2), (first, 3)):
        held.release()
        until(lambda began=began: held.began == began, "the next one runs")  # type: ignore[misc]
        assert one.result().status_code == 200
    assert not last.done()
    held.release()
    assert last.result().status_code == 200


@pytest.mark.parametrize("gw", [("30s", 64)], indirect=True)
def test_a_key_has_its_share_of_the_slots_that_several_wait_for(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    """Four fifths for one of weight 4, beside one of weight 1 that has asked for as much before it."""
    placed(gw, leader, 1, "node-1")
    keys = {name: {"Authorization": f"Bearer {gw.new_key(weight=weight)}"} for name, weight in (("a", 1), ("b", 4))}
    held = Held()
    hold(gw, held)
    asked = [callers.submit(gw.post)]
    until(lambda: held.running == 1, "one runs")
    for name in "a" * 8 + "b" * 8:
        body = gw.chat(stream=False, messages=[{"role": "user", "content": name}])
        asked.append(callers.submit(gw.post, body=body, headers=keys[name]))
        until(lambda: leader.waiting() == len(asked) - 1, "it waits")
    known = len(gw.nodes[0].requests)
    for began in range(2, 12):
        held.release()
        until(lambda began=began: held.began == began, "the next one runs")  # type: ignore[misc]
    served = "".join(one["body"]["messages"][0]["content"] for one in gw.nodes[0].requests[known:])
    assert (len(served), served.count("b")) == (10, 8), served
    held.release(40)
    assert {one.result().status_code for one in asked} == {200}


@pytest.mark.parametrize("gw", [("500ms", 3)], indirect=True)
def test_who_waits_for_a_model_that_is_nowhere_has_the_time_of_a_load(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    """1.5 times what a load takes, as the leader measured, and a drain of what is in memory: of nothing, here."""
    leader.place("node-1", MODEL, 1)
    held = Held()
    hold(gw, held, 1)
    slow = callers.submit(gw.post)
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 3.0, "its answer takes long")
    held.release()
    assert slow.result().status_code == 200
    hold(gw, held, 0)
    led(gw, leader)
    leader.place("node-1", MODEL, 1, "absent")
    leader.ask(b"HSET", b"corral:1:loads", MODEL.encode(), b"1000000")

    def waited() -> tuple[float, float]:
        """For how long it waited, at most and at least: the machine may have woken us late."""
        began = time.monotonic()
        with lateness() as woken:
            late = gw.post()
        took = time.monotonic() - began
        assert late.status_code == 503 and "no slot for 'm' within" in late.json()["error"]
        return took, took - max(woken)

    most, least = waited()
    assert most >= 1.5 and least < 3.5
    resident = [node | {"ps": [{"name": MODEL}]} for node in gw.control.snapshot["nodes"]]
    gw.control.publish(nodes=resident)
    gw.control.until_known()
    most, least = waited()
    assert most >= 3.5 and least < 6.0, "as long again for what runs, but no more than four times what the queue may"


@pytest.mark.parametrize("gw", [("120s", 64)], indirect=True)
def test_bodies_of_those_who_wait_are_bounded(gw: Gateway, leader: Leader, callers: ThreadPoolExecutor) -> None:
    """By 256 MB of what they sent and of what nodes are to get, before the queue's length is.

    Bodies of 31 MiB are read for seconds each on a machine that is busy.
    """
    placed(gw, leader, 1, "node-1")
    held = Held()
    hold(gw, held)
    runs = callers.submit(gw.post, timeout=120)
    until(lambda: held.running == 1, "one runs")
    large = gw.chat(stream=False, messages=[{"role": "user", "content": "x" * (31 << 20)}])
    waits = []
    for number in range(4):  # each is held twice
        waits.append(callers.submit(gw.post, body=large, timeout=120))
        until(lambda number=number: leader.waiting() == number + 1, "it waits")  # type: ignore[misc]
    assert gw.post(body=large, timeout=120).status_code == 503
    until(lambda: leader.waiting() == 4, "its ticket is given up")
    small = callers.submit(gw.post, timeout=120)
    until(lambda: leader.waiting() == 5, "what is small waits all the same")
    held.release(6)
    assert [one.result(120).status_code for one in (runs, small, *waits)] == [200] * 6


@pytest.mark.parametrize("gw", [("120s", 64)], indirect=True)
def test_who_lost_its_node_waits_at_the_head_whatever_the_bodies_of_those_who_wait(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    """It ends before the first token, and its slot is another's by then: with its body they exceed 256 MB."""
    placed(gw, leader, 1, "node-1", "node-2")
    ends, first, others = threading.Event(), Held(), Held()
    served: list[str] = []

    def behave(node: FakeNode, connection: socket.socket) -> None:
        served.append(node.asked.body["messages"][0]["content"][:1])
        if len(served) == 1:
            ends.wait(120)
            connection.close()
        else:
            (first if len(served) == 2 else others)(connection)

    def ask(letter: str, size: int = 31 << 20) -> Future[httpx.Response]:
        content = [{"role": "user", "content": letter * size}]
        return callers.submit(gw.post, body=gw.chat(stream=False, messages=content), timeout=120)

    for node in gw.nodes:
        node.script = [partial(behave, node)] * 8
    asked = [ask("o")]
    until(lambda: served == ["o"], "it runs")
    asked.append(ask("b", 1))
    until(lambda: served == ["o", "b"], "one runs on the other node")
    for number, (letter, size) in enumerate([("s", 1), *[("l", 31 << 20)] * 4]):
        asked.append(ask(letter, size))
        until(lambda number=number: leader.waiting() == number + 1, "it waits")  # type: ignore[misc]
    assert ask("l").result(120).status_code == 503, "no more than these may wait"
    until(lambda: leader.waiting() == 5, "its ticket is given up")
    ends.set()
    until(lambda: "".join(served) == "obs" and leader.waiting() == 5, "its slot is another's, and it waits again")
    first.release()
    until(lambda: "".join(served) == "obso", "it is the first whose turn comes")
    others.release(6)
    answers = [one.result(120) for one in asked]
    assert [one.status_code for one in answers] == [200] * 7, [one.text[:200] for one in answers]
    assert answers[0].headers["X-Corral-Attempts"] == "2"


def test_a_dead_node_that_alone_had_the_model_costs_a_wait_and_no_request(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    placed(gw, leader, 4, "node-1", "node-2")
    leader.place("node-2", MODEL, 4, "absent")
    gw.nodes[0].stop()
    try:
        asked = callers.submit(gw.post)
        until(lambda: leader.waiting() == 1, "it waits")
        leader.place("node-2", MODEL, 4)
        answer = asked.result()
        assert (answer.status_code, answer.headers["X-Corral-Node"]) == (200, "node-2")
        leader.place("node-2", MODEL, 4, "absent")
        asked = callers.submit(gw.post)
        until(lambda: leader.waiting() == 1, "it waits")
    finally:
        gw.nodes[0].restart()
    answer = asked.result()
    assert (answer.status_code, answer.headers["X-Corral-Node"]) == (200, "node-1"), "it is back"
    until(lambda: not leader.used() and not leader.waiting(), "nothing is held")


def test_a_node_that_dies_slowly_is_not_taken_for_two_that_died(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    """It takes a connection when it has let go of another: a request that was at two crashes is not tried again."""
    placed(gw, leader, 4, "node-1", "node-2")
    leader.place("node-2", MODEL, 4, "absent")
    gw.nodes[0].script = [socket.socket.close] * 4
    asked = callers.submit(gw.post)
    until(lambda: leader.waiting() == 1, "it waits")
    leader.place("node-2", MODEL, 4)
    answer = asked.result()
    assert (answer.status_code, answer.headers["X-Corral-Node"]) == (200, "node-2")
    until(lambda: not leader.used() and not leader.waiting(), "nothing is held")


def test_an_estimate_knows_for_how_long_those_have_run_that_run(
    gw: Gateway, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    placed(gw, leader, 1, "node-1")
    assert {gw.post().status_code for _ in range(20)} == {200}, "short ones"
    held = Held()
    hold(gw, held)
    asked = [callers.submit(gw.post) for _ in range(4)]
    until(lambda: leader.waiting() == 3, "the queue is full")
    until(lambda: int(gw.post().headers["X-Corral-Queue-Estimate-Ms"]) > 3000, "the one that runs is no short one")
    held.release(4)
    assert [one.result().status_code for one in asked] == [200] * 4


def test_who_leaves_again_and_again_holds_no_more_slots_than_may_run_of_it(gw: Gateway, leader: Leader) -> None:
    """Its node reads the prompt for a while yet: until then its slot is taken, and it has a request that runs."""
    placed(gw, leader, 4, "node-1")
    one_at_a_time = {"Authorization": f"Bearer {gw.new_key(concurrency=1)}"}
    node = gw.nodes[0]
    node.script = [node.wait_for_close]
    known = len(node.requests)
    body = gw.chat(messages=[{"role": "user", "content": "again and again " * 300}])
    caller = http.client.HTTPConnection("127.0.0.1", gw.port)
    caller.request("POST", "/api/chat", json.dumps(body), one_at_a_time)
    until(lambda: len(node.requests) > known, "its node has it")
    caller.close()
    until(node.ended.is_set, "its node hears that it has left")
    assert leader.used() == {"node-1": 1}
    assert gw.post(headers=one_at_a_time).status_code == 429
    assert gw.post().status_code == 200
    until(lambda: gw.post(headers=one_at_a_time).status_code == 200, "the slot is free")
    until(lambda: not leader.used(), "nothing is held")
