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

from support.load import CHAT, TOLD, WHOLE, Answer, Client, body_of
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

        def ask(tokens: int) -> None:
            client = Client(up.url, key, 60)
            ended.append(client.ask(CHAT, body_of(CHAT, model, tokens), f"t-{tokens}", begun.append))
            client.close()

        callers = [threading.Thread(target=ask, args=(tokens,)) for tokens in (SHORT, LONG)]
        for caller in callers:
            caller.start()
        until(lambda: len(begun) == 2, "both have begun", 30)
        known, asked = (up.state.stack() or {})["ports"], time.monotonic()
        assert up.stop(signal.SIGTERM) == 0
        took = time.monotonic() - asked
        for caller in callers:
            caller.join()
        assert "answers that have begun may end" in up.said
        assert [answer.fate for answer in ended] == [WHOLE, TOLD], [str(answer) for answer in ended]
        last = json.loads(ended[1].body.splitlines()[-1])
        assert "is being stopped" in last["error"], last
        assert 25 < took < 35
        nothing_left(up.state, known)
        with closing(sqlite3.connect(up.state.root / "corral.db")) as database:
            recorded = "SELECT request_id, outcome FROM audit WHERE request_id LIKE 't-%'"
            found = dict(database.execute(recorded).fetchall())
        assert found == {f"t-{SHORT}": "ok", f"t-{LONG}": "interrupted"}
    finally:
        up.stop()
    matrix("`corral down` under streams", "whole, or told after 25 s", f"stopped after {took:.1f} s")
