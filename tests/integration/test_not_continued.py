"""What is more than text is gone on with by nobody: an answer that is cut ends with an error in the form of its API."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.gateway import HEAD, Gateway, chunk, gateway
from support.load import TOLD, Answer

CHAT, GENERATE, MESSAGES = "/api/chat", "/api/generate", "/v1/messages"
CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DIGEST = "sha256:" + "a" * 64
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}}
FUNCTION = {"name": "find", "description": "Finds.", "parameters": SCHEMA}
TOOLS = {"tools": [{"type": "function", "function": FUNCTION}]}
ADDRESS = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
SOURCE = {"type": "base64", "media_type": "image/png", "data": PIXEL}
THOUGHT = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "b"}]


def says(*contents: Any) -> dict[str, Any]:
    """Messages of a user and a model, by turns."""
    roles = ("user", "assistant", "user")
    return {"messages": [{"role": role, "content": one} for role, one in zip(roles, contents, strict=False)]}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat, tools": (CHAT, TOOLS),
    "chat, format": (CHAT, {"format": SCHEMA}),
    "chat, images": (CHAT, {"messages": [{"role": "user", "content": "a", "images": [PIXEL]}]}),
    "chat, logprobs": (CHAT, {"logprobs": True}),
    "chat, thinking": (CHAT, {"think": True}),
    "generate, format": (GENERATE, {"format": "json"}),
    "generate, images": (GENERATE, {"images": [PIXEL]}),
    "generate, logprobs": (GENERATE, {"logprobs": True}),
    "generate, thinking": (GENERATE, {"think": True}),
    "generate, suffix": (GENERATE, {"suffix": "b"}),
    "v1 chat, tools": (CHATS, TOOLS),
    "v1 chat, format": (CHATS, {"response_format": {"type": "json_object"}}),
    "v1 chat, images": (CHATS, says([{"type": "text", "text": "a"}, ADDRESS])),
    "v1 chat, logprobs": (CHATS, {"logprobs": True}),
    "v1 chat, thinking": (CHATS, {"reasoning_effort": "high"}),
    "v1 completion, logprobs": (COMPLETIONS, {"logprobs": 1}),
    "v1 completion, suffix": (COMPLETIONS, {"suffix": "b"}),
    "messages, tools": (MESSAGES, {"tools": [{"name": "find", "description": "Finds.", "input_schema": SCHEMA}]}),
    "messages, images": (MESSAGES, says([{"type": "text", "text": "a"}, {"type": "image", "source": SOURCE}])),
    "messages, thinking": (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2048}),
    "messages, thoughts before": (MESSAGES, says("a", THOUGHT, "c")),
}


@pytest.fixture(scope="module")
def gw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Its model has passed the test of being gone on with."""
    with gateway(tmp_path_factory.mktemp("gateway")) as made:
        tag = {"name": "m:latest", "model": "m:latest", "modified_at": "2026-11-23T15:00:00Z", "digest": DIGEST}
        made.control.publish(continuable={"m:latest": DIGEST})
        made.publish(tags=[tag])
        yield made


def body_of(path: str, more: dict[str, Any]) -> dict[str, Any]:
    """A request for a stream."""
    made: dict[str, Any] = {"model": "m", "stream": True}
    made |= {"prompt": "a"} if path in (GENERATE, COMPLETIONS) else says("a")
    return made | ({"max_tokens": 9} if path == MESSAGES else {}) | more


def cut(connection: socket.socket) -> None:
    """A node that says two words of a chat and of a completion alike, and half a line, and is gone."""
    for word in ("one ", "two "):
        said = {"model": "m", "message": {"role": "assistant", "content": word}, "response": word, "done": False}
        connection.sendall((HEAD if word == "one " else b"") + chunk(json.dumps(said).encode() + b"\n"))
    connection.sendall(chunk(b'{"model":"m","response":"never sent'))
    connection.close()


def asked(gw: Gateway, path: str, more: dict[str, Any]) -> tuple[Answer, int]:
    """What a caller hears whose answer is cut, and how many requests nodes had for it."""
    gw.forget()
    for node in gw.nodes:
        node.script = [cut] * 9
    got = httpx.post(gw.url + path, json=body_of(path, more), headers=gw.auth, timeout=60)
    requests = sum(len(node.requests) for node in gw.nodes)
    gw.forget()
    return Answer(path, "", status=got.status_code, headers=dict(got.headers), body=got.content), requests


@pytest.mark.parametrize("what", CASES)
def test_it_ends_with_an_error_of_its_api(gw: Gateway, what: str) -> None:
    path, more = CASES[what]
    answer, requests = asked(gw, path, more)
    assert (answer.status, answer.fate) == (200, TOLD), str(answer)
    assert b"one " in answer.body and b"two " in answer.body and b"never sent" not in answer.body
    last = json.loads(answer.body.decode().rstrip().splitlines()[-1].removeprefix("data: "))
    if path in (CHAT, GENERATE):
        assert isinstance(last["error"], str)
    elif path == MESSAGES:
        assert last["type"] == "error" and last["error"]["type"] == "api_error"
    else:
        assert last["error"]["type"] and last["error"]["message"]
    assert requests == 1, "nobody is asked for the rest of it"


@pytest.mark.parametrize("path", [CHAT, GENERATE, CHATS, COMPLETIONS, MESSAGES])
def test_text_is_asked_for_elsewhere(gw: Gateway, path: str) -> None:
    """In vain here, since the other node is cut too: so the requests above would have been."""
    _, requests = asked(gw, path, {})
    assert requests > 1
