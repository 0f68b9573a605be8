"""Prompts that runners crash under: whose they are, and for how long."""

from __future__ import annotations

import json
from typing import Any

import pytest

from corral.gateway.crashing import KNOWN_MAX, REFUSED_FOR, Crashing, fingerprint, refused
from corral.gateway.recover import Failure, RetryBudget, classify, crashed, may_retry
from corral.wire.common import CAPS, Decoded
from corral.wire.decode import DECODERS


def decode(text: str = "a", route: str = "/api/chat", **more: Any) -> Decoded:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **more}
    return DECODERS[route](json.dumps(body).encode(), "r1", lambda model: None, CAPS)


def test_a_fingerprint_is_of_model_and_prompt_alone() -> None:
    same = [decode(), decode(options={"seed": 7}), decode(stream=False), decode(route="/v1/chat/completions")]
    assert len({fingerprint(each) for each in [*same, decode(model="m:latest")]}) == 1
    assert len({fingerprint(each) for each in [same[0], decode("b"), decode(model="other")]}) == 3


def test_a_request_at_two_crashes_of_runners_is_refused_for_ten_minutes() -> None:
    known = Crashing()
    assert known.present(decode(), 1, runner=True, alone=False, now=10.0) == ""
    assert known.present(decode(), 2, runner=True, alone=False, now=11.0) == fingerprint(decode())
    assert known.refuses(decode(), 12.0)
    assert not known.refuses(decode("b"), 12.0)
    assert known.refuses(decode(), 10.9 + REFUSED_FOR)
    assert not known.refuses(decode(), 11.1 + REFUSED_FOR)
    assert known.refused == {}
    assert (refused().status, refused().code) == (400, "prompt_refused")


def test_who_was_on_lost_nodes_is_not_blamed() -> None:
    known = Crashing()
    # As where half of a fleet fails at once: nobody's prompt is to be refused for that.
    assert known.present(decode(), 2, runner=False, alone=False, now=10.0) == ""
    assert known.present(decode(), 2, runner=False, alone=True, now=10.0) == ""
    assert not known.refuses(decode(), 11.0)


def test_two_requests_with_one_prompt_are_blamed_where_each_was_alone_with_a_runner() -> None:
    known = Crashing()
    assert known.present(decode(), 1, runner=False, alone=True, now=9.0) == "", "the node was lost, not its runner"
    assert known.present(decode(), 1, runner=True, alone=True, now=10.0) == ""
    assert known.present(decode(), 1, runner=True, alone=False, now=11.0) == ""
    assert known.present(decode(), 1, runner=True, alone=True, now=12.0) != ""
    later = Crashing()
    assert later.present(decode(), 1, runner=True, alone=True, now=10.0) == ""
    assert later.present(decode(), 1, runner=True, alone=True, now=11.0 + REFUSED_FOR) == ""


def test_what_is_known_is_bounded() -> None:
    known = Crashing()
    for number in range(KNOWN_MAX + 5):
        known.refuse(str(number), 1.0)
    assert len(known.refused) == KNOWN_MAX
    assert "0" not in known.refused


@pytest.mark.parametrize(
    "message",
    [
        "an error was encountered while running the model: unexpected EOF",
        "llama runner process has terminated: signal: killed",
        "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error",
        'Post "http://127.0.0.1:39021/completion": EOF',
        "do encode request: dial tcp 127.0.0.1:39021: connect: connection refused",
    ],
)
def test_a_runners_crash_is_told_from_a_nodes_failure(message: str) -> None:
    assert crashed(message)
    assert classify(500, False, message) is Failure.CRASH
    assert classify(400, False, message) is Failure.CALLER


def test_a_crash_is_retried_outside_the_budget_and_once() -> None:
    class History:
        attempts, orphaned, crashes, lost, connects, held_until = 1, 1, 1, 0, 0, 0.0

    budget = RetryBudget(tokens=0.0)
    assert may_retry(Failure.CRASH, History(), 2, budget)
    History.crashes = 2
    assert not may_retry(Failure.CRASH, History(), 2, budget)
    assert not may_retry(Failure.NODE, History(), 2, budget)
