"""The gateway's intended differences, asserted in themselves (differences.py), and what it adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conformance.cases import GREEDY, MODEL, POSTS, TOO_LONG
from conformance.differences import MANAGEMENT, OVER_LONG_STATUS
from conformance.exchange import Target, send

MESSAGES = [{"role": "user", "content": TOO_LONG}]
ROUTES = [name for name in POSTS if name not in ("show", "embeddings")]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_over_long_prompt_is_refused(gateway: Target, route: str, stream: bool) -> None:
    body: dict[str, Any] = {"model": MODEL, "stream": stream, "max_tokens": 4, "options": GREEDY}
    body |= {"prompt": TOO_LONG, "messages": MESSAGES, "input": TOO_LONG}
    if stream and "embed" in route:
        pytest.skip("embeddings are not streamed")
    answer = send(gateway, "POST", POSTS[route], body)
    assert answer.status == OVER_LONG_STATUS, answer
    error = answer.last["error"]
    assert "context length" in (error if isinstance(error, str) else error["message"])


@pytest.mark.parametrize("route", ["generate", "chat", "embed"])
def test_truncate_by_a_caller_is_not_taken(gateway: Target, route: str) -> None:
    body: dict[str, Any] = {"model": MODEL, "truncate": True, "stream": False, "options": GREEDY}
    body |= {"prompt": TOO_LONG, "messages": MESSAGES, "input": ["hello", TOO_LONG]}
    assert send(gateway, "POST", POSTS[route], body).status == OVER_LONG_STATUS


def test_context_size_by_a_caller_is_not_taken(gateway: Target) -> None:
    prompt = "word " * 400
    body = {"model": MODEL, "prompt": prompt, "raw": True, "stream": False, "options": GREEDY | {"num_ctx": 256}}
    answer = send(gateway, "POST", "/api/generate", body)
    assert answer.status == 200 and answer.last["prompt_eval_count"] >= 400


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/api/generate", {"options": {"repeat_penalty": 0}}),
        ("/api/chat", {"options": {"temperature": 1e-39}}),
        ("/v1/chat/completions", {"presence_penalty": -3e38}),
        ("/v1/completions", {"frequency_penalty": -3e38}),
        ("/api/generate", {"format": {"type": "string", "maxLength": 5000}}),
        ("/api/chat", {"format": {"type": "string", "pattern": "a{3000}"}}),
    ],
)
def test_what_ends_a_runner_does_not_reach_it(gateway: Target, path: str, fields: dict[str, Any]) -> None:
    """Each of them, sent to Ollama 0.17.4 itself, is the end of the model's runner, and of all answers it gives."""
    body = {"model": MODEL, "prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    answer = send(gateway, "POST", path, body | fields)
    said = str(answer.last["error"])
    assert answer.status == 400 and ("is out of range" in said or "from 0 to 2000" in said), answer


@pytest.mark.parametrize(("method", "path"), MANAGEMENT)
def test_management_is_not_there(gateway: Target, target_of: Callable[[str], Target], method: str, path: str) -> None:
    # By the node itself: what a gateway lists may be five seconds old.
    node = target_of(gateway.name.removeprefix("gateway-"))
    before = send(node, "GET", "/api/tags")
    whole = {"model": MODEL, "name": MODEL, "source": MODEL, "destination": "copy"}
    # A body that a node would refuse is not looked at either.
    for body in (whole, {}, None):
        assert send(gateway, method, path, body).status == 404
    assert send(node, "GET", "/api/tags") == before


def test_response_headers(gateway: Target) -> None:
    body = {"model": MODEL, "prompt": "hi", "options": GREEDY}
    for stream in (True, False):
        with gateway.client() as client:
            response = client.post("/api/generate", json=body | {"stream": stream}, headers={"X-Request-ID": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1"
        assert response.headers["x-corral-node"] == "node-1"
        assert response.headers["x-corral-attempts"] == "1"
        assert int(response.headers["x-corral-queue-ms"]) >= 0
