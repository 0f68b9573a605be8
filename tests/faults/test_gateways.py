"""A gateway is killed under load: what it had begun is cut so that the caller sees it, and nothing is unrecorded."""

from __future__ import annotations

import os
import signal
import time

import httpx
from support.fleet import Fleet
from support.load import CUT, WHOLE, after
from support.process import until

BACK_WITHIN = 3.0


def test_a_killed_gateway_is_back_and_each_of_its_requests_is_on_record(fleet: Fleet) -> None:
    gateway = fleet.stack.corral("status")["gateways"][0]
    with fleet.load(tokens=[40, 8], name="gateway") as load:
        load.more(40)
        # The long ones of both gateways: there is no telling from outside which is whose.
        load.until(lambda _: len(load.streaming) >= 12, "streams run on both gateways")
        os.kill(gateway["pid"], signal.SIGKILL)
        killed = time.monotonic()

        def back() -> bool:
            try:
                return httpx.get(gateway["url"] + "/health/ready", timeout=1).status_code == 200
            except httpx.HTTPError:
                return False

        until(lambda: not os.path.exists(f"/proc/{gateway['pid']}") and back(), "the gateway is back", 10)
        assert time.monotonic() - killed < BACK_WITHIN
        load.until(lambda answers: len(after(answers, killed + BACK_WITHIN)) > 40, "requests go on")

    # What was begun cannot be whole; what was not is the edge's to replay: nobody hears of it.
    assert load.unlike(WHOLE, CUT) == []
    cut = [answer for answer in load.answers if answer.fate == CUT]
    assert cut, "the killed gateway had no stream"
    assert [str(answer) for answer in cut if not answer.first] == []
    assert [str(answer) for answer in cut if answer.began > killed] == []

    ended = [answer.request_id for answer in load.answers if answer.fate == WHOLE]
    fleet.records(*ended)
    records = fleet.admitted(*(answer.request_id for answer in load.answers))
    for answer, record in zip(load.answers, records, strict=True):
        # Its gateway died before it could say how it ended: what was admitted stands all the same, open for fifteen
        # seconds and then settled by control.
        outcomes = ("ok",) if answer.fate == WHOLE else (None, "interrupted")
        assert record["outcome"] in outcomes, (str(answer), record)
