"""Two real gateways that share the slots of a node: together they have no more running than there are slots."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.gateway import Gateway
from support.held import MODEL, Held, hold, leading, led, placed, queueing
from support.leader import Leader
from support.process import until
from support.second import SHARING, Second


@pytest.fixture
def gw(tmp_path: Path) -> Iterator[Gateway]:
    with queueing(tmp_path, "30s", 64) as made:
        yield made


@pytest.fixture
def second(gw: Gateway, tmp_path: Path) -> Iterator[Second]:
    made = Second(gw, tmp_path)
    try:
        made.process.wait_until(made.up)
        yield made
    finally:
        made.process.end()


@pytest.fixture
def leader(gw: Gateway, second: Second) -> Leader:
    return leading(gw, gateways=2)


def stays_so() -> None:
    """Let what should not change have the time to."""
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 1.5, "time passes")


def ends(held: Held, asked: list[Future[httpx.Response]]) -> None:
    """Let all of them end."""
    while not all(one.done() for one in asked):
        held.release()
        time.sleep(0.02)
    assert [one.result().status_code for one in asked] == [200] * len(asked)


def test_a_store_that_was_flushed_grants_what_is_free_and_no_gateway_does_meanwhile(
    gw: Gateway, second: Second, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    """All slots are taken at one gateway, which tells; the other one's requests wait for that."""
    placed(gw, leader, 4, "node-1")
    second.knows()
    connections = second.connections()
    held = Held()
    hold(gw, held)
    asked = [callers.submit(gw.post) for _ in range(4)]
    until(lambda: held.running == 4, "all slots are taken")
    for turn in (1, 2, 3):
        leader.ask(b"FLUSHALL")
        asked += [callers.submit(second.post) for _ in range(2)]
        leader.leads()
        until(lambda: bool(leader.ask(b"EXISTS", b"corral:1:slots-grant")), "it grants again")
        leader.place("node-1", MODEL, 4)
        until(lambda turn=turn: others_wait(held, leader, 4 + turn * 2), "the others wait")  # type: ignore[misc]
    ends(held, asked)
    assert held.most == 4 or second.connections() > connections
    until(lambda: leader.counts() == (0, 0) and not leader.waiting(), "nothing is held")


def others_wait(held: Held, leader: Leader, asked: int) -> bool:
    """Whether the store counts what runs, and all others wait."""
    return leader.counts() == (held.running, held.running) and held.running + leader.waiting() == asked


@pytest.mark.parametrize("known", [True, False], ids=["placed", "nowhere"])
def test_without_a_leader_the_store_counts_for_both(
    gw: Gateway, second: Second, leader: Leader, callers: ThreadPoolExecutor, known: bool
) -> None:
    """Whether the last leader had placed the model or not, and then where the node with it goes and another has it."""
    placed(gw, leader, 1, "node-1")
    second.knows()
    if not known:
        leader.place("node-1", MODEL, 1, "absent")
    leader.leaves()
    connections = second.connections()
    held = Held()
    hold(gw, held)
    asked = [callers.submit(one.post) for one in (gw, second) * 3]
    until(lambda: held.running > 0 and others_wait(held, leader, 6), "one runs, the others wait")
    stays_so()
    for _ in range(2):
        assert held.most == 1 or second.connections() > connections
        began = held.began
        held.release(held.running)
        until(lambda began=began: held.began > began, "the next has its turn")  # type: ignore[misc]
    began = held.began
    gw.states = {"node-1": "down", "node-2": "ready"}
    gw.publish()
    places = b"corral:1:places:" + MODEL.encode()

    def moved() -> bool:
        words = leader.ask(b"HMGET", places, b"node-1", b"node-2")
        return [word and word.split(b" ")[0] for word in words] == [b"absent", b"resident"]

    until(moved, "it is where both gateways see that it can be")
    until(lambda: held.began > began, "the next has its turn")
    assert gw.nodes[1].requests
    ends(held, asked)
    leader.place("node-1", MODEL, 1, "absent")
    leader.place("node-2", MODEL, 1)
    leader.leads()
    led(gw, leader)
    until(lambda: leader.counts() == (0, 0) and not leader.waiting(), "nothing is held")


def test_without_the_store_each_gateway_gives_its_own_slots_alone(
    gw: Gateway, second: Second, leader: Leader, callers: ThreadPoolExecutor
) -> None:
    """Whole slots, shared out without a word: all are used, and none by two."""
    placed(gw, leader, 4, "node-1")
    second.knows()
    held = Held()
    hold(gw, held)
    until(lambda: gw.metric(SHARING) == second.seen() == 2, "they know of each other")
    gw.valkey.process.send(signal.SIGSTOP)
    try:
        asked = [callers.submit(one.post) for one in (gw, second) * 6]
        until(lambda: held.running == 4, "both gateways' slots are taken")
        stays_so()
        assert (held.most, held.began) == (4, 4)
        held.release()
        until(lambda: held.began == 5, "the next has its turn")
    finally:
        gw.valkey.process.send(signal.SIGCONT)
    ends(held, asked)
    assert held.most == 4
    until(lambda: leader.counts() == (0, 0) and not leader.waiting(), "nothing is held")


@pytest.mark.parametrize("by", ["control", "its file"])
def test_one_that_is_killed_and_starts_again_without_the_store_shares_the_limits(
    gw: Gateway, second: Second, by: str
) -> None:
    """It knows of the other one by control, or by what it knew before; and not what its own minute was."""
    limit = 20
    key = {"Authorization": f"Bearer {gw.new_key(rpm=limit)}"}
    second.knows()
    until(lambda: gw.metric(SHARING) == second.seen() == 2, "they know of each other")
    kept = gw.folder / "cache/gateway-2/gateways.json"
    until(lambda: kept.exists() and "gateway-1" in kept.read_text(), "it is kept")
    gw.valkey.process.end(signal.SIGKILL)
    began = time.monotonic()

    def passed() -> list[int]:
        answers = [(gw.post(headers=key), second.post(**key)) for _ in range(limit)]
        assert {answer.status_code for pair in answers for answer in pair} <= {200, 429}
        return [sum(pair[at].status_code == 200 for pair in answers) for at in (0, 1)]

    first = passed()
    assert min(first) >= limit // 2, "each has its share"
    second.process.end(signal.SIGKILL)
    if by == "control":
        kept.unlink()
    else:
        gw.control.stop()
    second.restart()
    assert second.seen() == 2
    assert sum(first) + sum(passed()) <= limit * 1.1 + limit * (time.monotonic() - began) / 60
