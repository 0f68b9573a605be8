"""Every target answers every case as real Ollama does: status, Content-Type, shapes, order of events, counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conformance.cases import CASES, Case
from conformance.differences import DIFFERENCES, ERROR_TYPE, ERROR_WORDS, Difference, content_type
from conformance.exchange import Answer, Target, pick, send

SAME = Difference("")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_as_ollama(target: Target, case: Case, truth: Callable[[Case], Answer]) -> None:
    if case.bare and target.gateway:
        pytest.skip("a gateway does not take this option, or have this route: see test_gateway.py")
    expected = truth(case)
    difference = DIFFERENCES.get(case.name, SAME) if target.gateway else SAME
    answer = send(target, case.method, case.path, case.body, case.raw)

    if difference.status is not None:
        assert expected.status != difference.status or expected.media != "application/json", "no difference any more"
        assert answer.status == difference.status, answer
        check_error(case.path, answer)
        return
    assert answer.status == expected.status, answer
    assert answer.content_type == (content_type(expected) if target.gateway else expected.content_type)
    assert comparable(answer, target) == comparable(expected, target)
    changed = dict(difference.fields)
    for path in case.equal:
        wanted = changed.get(path, pick(last_object(expected), path)) if expected.status == 200 else None
        if expected.status == 200:
            assert pick(last_object(answer), path) == wanted, path
    for path, value in changed.items():
        assert pick(last_object(answer), path) == value
    if case.words and not target.gateway:
        assert answer.last == expected.last


def last_object(answer: Answer) -> Any:
    """The last event that is an object."""
    return [event.data for event in answer.events if isinstance(event.data, dict)][-1]


def comparable(answer: Answer, target: Target) -> Any:
    """The shape; an OpenAI error's words may say more than Ollama's null at a gateway."""
    shape = answer.shape()
    if target.gateway and answer.status >= 400:
        for _, value in shape:
            if isinstance(value, dict) and isinstance(value.get("error"), dict):
                for path in ERROR_WORDS:
                    name = path.partition(".")[2]
                    if value["error"].get(name) in ("null", "string"):
                        value["error"][name] = "null or string"
    return shape


def check_error(path: str, answer: Answer) -> None:
    """An error in the shape of the API that was called."""
    assert answer.content_type == ERROR_TYPE, answer
    error = answer.last
    if path.startswith("/v1/messages"):
        assert error["type"] == "error" and set(error["error"]) == {"type", "message"}
        assert error["error"]["message"]
    elif path.startswith("/v1/"):
        assert set(error) == {"error"} and set(error["error"]) == {"message", "type", "param", "code"}
        assert error["error"]["message"]
    else:
        assert set(error) == {"error"} and isinstance(error["error"], str) and error["error"]
