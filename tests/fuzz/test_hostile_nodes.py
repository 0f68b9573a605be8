"""Nodes that send anything at all, behind a real HAProxy and a real gateway: callers hear of it, and others do not."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import strategies as st
from support.fuzz import changes, cuts, fuzz, mutated
from support.gateway import END, HEAD, LAST, LINE, Gateway, chunk, gateway

WHOLE = HEAD + chunk(LINE % b"one") + chunk(LINE % b"two") + chunk(LAST % 2) + END
ERROR = b"HTTP/1.1 500 No\r\nContent-Length: 15\r\n\r\n" + b'{"error":"boom"}'[:15]
TOKENS = [
    *(b"\r\n", b"\n", b"\0", b"{", b'"', b"0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"Content-Length: 9\r\n", b"5\r\n"),
    *(
        b'"done":true',
        b'"error":"x"',
        b"X-Corral-Proxy: no-such-node\r\n",
        b"HTTP/1.1 101 S\r\n\r\n",
        b"Connection: close\r\n",
    ),
]
PATHS = ["/api/chat", "/api/generate", "/v1/chat/completions", "/v1/messages", "/api/embed", "/api/show"]


@pytest.fixture(scope="module")
def gw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    # Nodes share this process: where it halts for a second, none of them is silent for too long.
    settings: dict[str, Any] = {"gateway": {"first_token": "5s", "between_tokens": "5s"}}
    with gateway(tmp_path_factory.mktemp("hostile"), **settings) as started:
        yield started


def events(path: str, answer: httpx.Response) -> list[Any]:
    """A stream's events, as a client of its API reads them; ValueError where one is none."""
    if path.startswith("/api/"):
        return [json.loads(line) for line in answer.content.split(b"\n") if line.strip()]
    found: list[Any] = []
    for block in answer.content.decode().split("\n\n"):
        fields = [line.partition(": ") for line in block.splitlines()]
        if any(name not in ("event", "data") for name, _, _ in fields):
            raise ValueError(block)
        data = "\n".join(value for name, _, value in fields if name == "data")
        if data:
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


def is_end(event: Any) -> bool:
    """Whether an event ends a stream, in order or with an error."""
    if not isinstance(event, dict):
        return bool(event == "[DONE]")
    return event.get("done") is True or "error" in event or event.get("type") == "message_stop"


def check_form(path: str, stream: bool, answer: httpx.Response) -> None:
    """What a caller gets is an answer of its API whatever the node sent: whole, with one end, or an error."""
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert isinstance(error, dict if path.startswith("/v1/") else str) and error
    elif not stream or path in ("/api/embed", "/api/show"):
        assert isinstance(answer.json(), dict)
    else:
        ends = [is_end(event) for event in events(path, answer)]
        assert ends and ends[-1] and not any(ends[:-1]), answer.content


def test_hostile_nodes(gw: Gateway) -> None:
    # A gateway closes after an error within a stream: a connection kept for the next request would race with that.
    client = httpx.Client(headers=gw.auth, timeout=20, limits=httpx.Limits(max_keepalive_connections=0))
    seen: set[int] = set()
    number = itertools.count()

    def check(path: str, stream: bool, first: bytes, edits: Any, places: list[int]) -> None:
        data = mutated(first, edits)

        def send(connection: socket.socket) -> None:
            for piece in cuts(data, places):
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_RDWR)

        for node in gw.nodes:
            node.script = [send] * 3
        # Each its own: a prompt that is at two crashes is refused, and no node hears of it.
        said = f"prompt {next(number)}"
        body = gw.chat(stream=stream) | {"prompt": said, "input": said, "max_tokens": 5}
        body["messages"] = [{"role": "user", "content": said}]
        try:
            told = client.post(gw.url + path, json=body)
        except httpx.RemoteProtocolError as cut:
            raise AssertionError("an answer without its end") from cut
        seen.add(told.status_code)
        check_form(path, stream, told)
        assert gw.process.alive

    picks = st.sampled_from([WHOLE, ERROR])
    places = st.lists(st.integers(0, 1 << 12), max_size=3)
    assert fuzz(check, st.sampled_from(PATHS), st.booleans(), picks, changes(*TOKENS), places) > 10
    assert seen <= {200, 400, 404, 502, 503, 504}
    client.close()
    for node in gw.nodes:
        node.script = []
    assert [gw.post().status_code for _ in range(20)] == [200] * 20
    assert "Traceback" not in Path(gw.process.log).read_text()
