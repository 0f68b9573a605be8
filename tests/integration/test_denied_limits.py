"""A gateway whose policy is to deny: what callers hear while the store is away, in each API."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.gateway import Gateway, gateway

SAID = "the limit store is away and its policy is to deny"


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, str, str]]:
    """One without its store, a key that is denied, and one that has no such limit."""
    limits = {"on_store_failure": {"tpm": "deny"}, "default": {"rpm": None, "tpm": None, "concurrency": None}}
    with gateway(tmp_path_factory.mktemp("denied"), limits=limits) as gw:
        denied, other = gw.new_key(tpm=1_000_000), gw.new_key(rpm=1000)
        for key in (denied, other):
            assert gw.post(headers={"Authorization": f"Bearer {key}"}).status_code == 200
        gw.valkey.process.end(signal.SIGKILL)
        yield gw, denied, other


def native(body: Any) -> bool:
    return bool(body == {"error": SAID})


def openai(body: Any) -> bool:
    error = body["error"]
    return (error["message"], error["code"], error["param"]) == (SAID, "overloaded", None)


def anthropic(body: Any) -> bool:
    return (body["type"], body["error"]) == ("error", {"type": "overloaded_error", "message": SAID})


@pytest.mark.parametrize(
    ("path", "says"), [("/api/chat", native), ("/v1/chat/completions", openai), ("/v1/messages", anthropic)]
)
@pytest.mark.parametrize("stream", [True, False])
def test_who_has_such_a_limit_gets_a_503(away: tuple[Gateway, str, str], path: str, says: Any, stream: bool) -> None:
    gw, denied, other = away
    asked = len(gw.nodes[0].requests) + len(gw.nodes[1].requests)
    body = gw.chat(stream=stream, max_tokens=5)

    def ask(key: str) -> httpx.Response:
        return gw.post(path, body, headers={"Authorization": f"Bearer {key}"})

    answer = ask(denied)
    assert (answer.status_code, says(answer.json())) == (503, True), answer.text
    assert 1 <= int(answer.headers["Retry-After"]) <= 2
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")], "nobody knows what is left"
    assert len(gw.nodes[0].requests) + len(gw.nodes[1].requests) == asked, "no node hears of it"
    assert ask(other).status_code == 200
