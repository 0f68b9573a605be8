"""How far a stream has come is on record while it runs: of a gateway that is killed nothing else is known."""

from __future__ import annotations

import itertools
import socket
import statistics
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.gateway import END, HEAD, LAST, LINE, chunk, gateway
from support.process import until

EACH = 1.0
"""Seconds from one record of how far a stream is to the next: of so much a killed gateway leaves no trace."""


def test_how_far_a_stream_is_is_recorded_each_second(tmp_path: Path, matrix: Callable[[str, str, str], None]) -> None:
    ends = threading.Event()

    def slowly(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk(LINE % b"one"))
        ends.wait(60)
        connection.sendall(chunk(LAST % 1) + END)

    with gateway(tmp_path, gateway={"between_tokens": "60s"}) as gw, ThreadPoolExecutor(1) as callers:
        for node in gw.nodes:
            node.script = [slowly]
        try:
            asked = callers.submit(gw.post, body=gw.chat(), timeout=60)

            def at() -> list[float]:
                """When it was recorded, in seconds since it came, by the gateway's clock."""
                notes = [note for note in gw.control.notes if note["t"] == "progress"]
                return [row[-1] / 1e3 for note in notes for row in note["rows"]]

            until(lambda: len(at()) > 5, "it is recorded again and again", 60)
        finally:
            ends.set()
        assert asked.result().status_code == 200
    times = at()
    # The median: a machine that halts makes one of them long.
    apart = statistics.median(after - before for before, after in itertools.pairwise(times))
    matrix("how far a stream is", f"recorded each {EACH:g} s", f"{apart:.2f} s apart, first after {times[0]:.2f} s")
    assert EACH * 0.9 < apart < EACH * 1.5
