"""A slot that its caller leaves in decode is nobody's until the node has had a moment to notice."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
from support.held import Held, hold, leading, placed, queueing
from support.process import until

COOLS = 0.249
"""A slot that is left in decode stays taken for 0.25 s, by a clock that counts milliseconds."""


def test_a_slot_that_is_left_in_decode_stays_taken_until_its_node_has_noticed(
    tmp_path: Path, matrix: Callable[[str, str, str], None]
) -> None:
    with queueing(tmp_path, "30s", 3) as gw, ThreadPoolExecutor(2) as callers:
        leader = leading(gw)
        placed(gw, leader, 1, "node-1")
        held, began = Held(), list[float]()

        def notes(connection: socket.socket) -> None:
            began.append(time.monotonic())
            held(connection)

        hold(gw, notes)

        def leaves() -> float:
            """Begin an answer, and leave it at its first token; the time just before."""
            at = len(began)
            with httpx.stream("POST", gw.url + "/api/chat", json=gw.chat(), headers=gw.auth, timeout=20) as answer:
                pieces = answer.iter_raw()
                next(pieces)
                assert len(began) == at + 1
                # Where the gateway missed the store for 50 ms, that hears of it with the next connection.
                until(lambda: leader.used() == {"node-1": 1}, "it has the slot")
                if at:
                    asked.append(callers.submit(gw.post))
                    until(lambda: leader.waiting() == 1, "one waits")
                return time.monotonic()

        asked: list[Future[httpx.Response]] = []
        left = leaves()
        while leader.used():
            pass  # a look at a time: the first that sees it free came no sooner
        cooled = time.monotonic() - left
        assert cooled >= COOLS
        # And while it is taken, it is not given to who waits.
        left = leaves()
        until(lambda: len(began) == 3, "the next one has it")
        assert began[2] - left >= COOLS
        held.release(3)
        assert asked[0].result().status_code == 200
        until(lambda: not leader.used(), "nothing is held")
    matrix(
        "caller leaves in decode: its slot",
        ">= 250 ms nobody's",
        f"{cooled * 1e3:.0f} ms, {(began[2] - left) * 1e3:.0f} ms",
    )
