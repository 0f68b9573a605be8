"""`corral down` and Ctrl-C under open streams: nodes and edge stay until these have ended, or their time is over."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
from support.load import CHAT, REFUSED, TOLD, WHOLE, Answer, Client, body_of
from support.process import until
from support.up import Up, nothing_left

SHORT, LONG = 240, 40_000
"""Tokens: an answer of some seconds, and one that outlasts any patience."""


def test_answers_that_have_begun_end_before_their_nodes_do(
    tmp_path: Path, matrix: Callable[[str, str, str], None]
) -> None:
    up = Up(tmp_path / "state")
    try:
        told = up.ready()
        key, model = str(told["key"]), str(told["model"])
        begun: list[Answer] = []
        ended: list[Answer] = []

        def ask(tokens: int, stream: bool) -> None:
            client = Client(up.url, key, 60)
            body = body_of(CHAT, model, tokens, stream=stream)
            ended.append(client.ask(CHAT, body, f"t-{tokens}-{stream}", begun.append))
            client.close()

        asked_for = [(SHORT, True), (LONG, True), (LONG, False)]
        callers = [threading.Thread(target=ask, args=what) for what in asked_for]
        for caller in callers:
            caller.start()
        urls = [node["url"] for node in (up.state.stack() or {})["nodes"]]

        def all_run() -> bool:
            """Also the third one, of which nothing is seen: who comes later is refused for another reason."""
            works = [httpx.get(url + "/simulated/work").json()["models"].values() for url in urls]
            return len(begun) == 2 and sum(of["running"] for models in works for of in models) + len(ended) >= 3

        until(all_run, "all run")
        known, asked = (up.state.stack() or {})["ports"], time.monotonic()
        assert up.stop(signal.SIGTERM) == 0
        took = time.monotonic() - asked
        for caller in callers:
            caller.join()
        assert "answers that have begun may end" in up.said
        fates = {answer.request_id: (answer.status, answer.fate) for answer in ended}
        assert fates == {
            f"t-{SHORT}-True": (200, WHOLE), f"t-{LONG}-True": (200, TOLD), f"t-{LONG}-False": (503, REFUSED)
        }, [str(answer) for answer in ended]  # fmt: skip
        for answer in ended[1:]:
            assert "is being stopped" in json.loads(answer.body.splitlines()[-1])["error"], answer
        # What is left then is told at once; how long the processes take to end is the machine's.
        last = max(answer.ended for answer in ended) - asked
        assert 25 < last < 35
        nothing_left(up.state, known)
        with closing(sqlite3.connect(up.state.root / "corral.db")) as database:
            recorded = "SELECT request_id, outcome FROM audit WHERE request_id LIKE 't-%'"
            found = dict(database.execute(recorded).fetchall())
        assert found == {name: "ok" if fate == WHOLE else "interrupted" for name, (_, fate) in fates.items()}
    finally:
        up.stop()
    measured = f"told after {last:.1f} s, stopped after {took:.1f} s"
    matrix("`corral down` under streams", "whole, or told after 25 s", measured)
