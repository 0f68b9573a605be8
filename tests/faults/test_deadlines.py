"""What a caller's own time is: its deadline is met, and who has left holds nothing for longer than its node does."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.gateway import Gateway
from support.held import Held, hold, leading, placed, queueing
from support.process import until

Matrix = Callable[[str, str, str], None]

ASKED, AT_ONCE = 120, 8
LATE = 0.1
"""Seconds, for nine in ten: what looks at all requests comes by each half second."""
FREE = 2.0


@pytest.fixture
def gw(tmp_path: Path) -> Iterator[Gateway]:
    with queueing(tmp_path, "30s", 64) as made:
        placed(made, leading(made), 2 * ASKED, "node-1")
        yield made


def test_deadlines_of_callers_are_met(gw: Gateway, matrix: Matrix) -> None:
    held = Held()
    hold(gw, held, 2 * ASKED)
    draw = random.Random(0)
    client = httpx.Client(base_url=gw.url, timeout=20)

    def late(milliseconds: int) -> float:
        headers = gw.auth | {"X-Corral-Deadline-Ms": str(milliseconds)}
        began = time.monotonic()
        answer = client.post("/api/chat", json=gw.chat(stream=False), headers=headers)
        assert answer.status_code == 504, answer.text
        return time.monotonic() - began - milliseconds / 1e3

    with client, ThreadPoolExecutor(AT_ONCE) as callers:
        found = sorted(callers.map(late, [draw.randrange(50, 600) for _ in range(ASKED)]))
    held.release(2 * ASKED)
    p90 = found[len(found) * 9 // 10]
    matrix("deadlines of callers, 0.05 to 0.6 s", f"p90 at most {LATE:g} s late", f"{p90 * 1e3:.0f} ms of {ASKED}")
    assert found[0] >= -0.001, "none too early"
    assert p90 < LATE


def test_who_left_without_a_slot_holds_nothing(gw: Gateway, matrix: Matrix) -> None:
    one_at_a_time = {"Authorization": f"Bearer {gw.new_key(concurrency=1)}"}
    for node in gw.nodes:
        node.script = [node.wait_for_close]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(gw.url + "/api/show", json={"model": "m"}, headers=one_at_a_time, timeout=0.3)
    for node in gw.nodes:
        node.script = []
    began = time.monotonic()
    until(lambda: gw.post(headers=one_at_a_time).status_code == 200, "its key may ask again", every=0.01)
    took = time.monotonic() - began
    matrix("a caller leaves a request that has no slot", f"its key may ask again within {FREE:g} s", f"{took:.2f} s")
    assert took < FREE
