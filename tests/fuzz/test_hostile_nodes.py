"""Nodes that send anything at all, behind a real HAProxy and a real gateway: callers hear of it, and others do not."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import strategies as st
from support.fuzz import changes, cuts, fuzz, mutated
from support.gateway import END, HEAD, LAST, LINE, Gateway, chunk, gateway

BEGUN = HEAD + chunk(LINE % b"one")
REST = chunk(LINE % b"two") + chunk(LAST % 2) + END
WHOLE = BEGUN + REST
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
TALKS = ["/api/chat", "/v1/chat/completions", "/v1/messages"]
"""Of whose streams the caller has the first line before the node sends what makes no sense."""
MOMENT = 5.0
PATHS = ["/api/chat", "/api/generate", "/v1/chat/completions", "/v1/messages", "/api/embed", "/api/show"]


@pytest.fixture(scope="module")
def gw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    # Nodes share this process: where it halts for a second, none of them is silent for too long.
    settings: dict[str, Any] = {"gateway": {"first_token": "5s", "between_tokens": "5s"}}
    with gateway(tmp_path_factory.mktemp("hostile"), **settings) as started:
        yield started


def events(path: str, content: bytes) -> list[Any]:
    """A stream's events, as a client of its API reads them; ValueError where one is none."""
    if path.startswith("/api/"):
        return [json.loads(line) for line in content.split(b"\n") if line.strip()]
    found: list[Any] = []
    for block in content.decode().split("\n\n"):
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


def check_form(path: str, stream: bool, status: int, content: bytes) -> None:
    """What a caller gets is an answer of its API whatever the node sent: whole, with one end, or an error."""
    if status != 200:
        error = json.loads(content)["error"]
        assert isinstance(error, dict if path.startswith("/v1/") else str) and error
    elif not stream or path in ("/api/embed", "/api/show"):
        assert isinstance(json.loads(content), dict)
    else:
        ends = [is_end(event) for event in events(path, content)]
        assert ends and ends[-1] and not any(ends[:-1]), content


def test_hostile_nodes(gw: Gateway) -> None:
    # A gateway closes after an error within a stream: a connection kept for the next request would race with that.
    client = httpx.Client(headers=gw.auth, timeout=20, limits=httpx.Limits(max_keepalive_connections=0))
    seen: set[int] = set()
    number = itertools.count()

    def check(path: str, stream: bool, first: bytes, edits: Any, places: list[int]) -> None:
        begun = stream and first is REST and path in TALKS
        data = mutated(first if begun or first is ERROR else WHOLE, edits)

        came = threading.Event()

        def send(connection: socket.socket) -> None:
            if begun:
                connection.sendall(BEGUN)
                came.wait(MOMENT)
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
            with client.stream("POST", gw.url + path, json=body) as told:
                pieces = told.iter_bytes()
                content = next(pieces, b"")
                came.set()
                content += b"".join(pieces)
        except httpx.RemoteProtocolError as cut:
            raise AssertionError("an answer without its end") from cut
        seen.add(told.status_code)
        check_form(path, stream, told.status_code, content)
        assert gw.process.alive

    picks = st.sampled_from([WHOLE, REST, ERROR])
    places = st.lists(st.integers(0, 1 << 12), max_size=3)
    assert fuzz(check, st.sampled_from(PATHS), st.booleans(), picks, changes(*TOKENS), places) > 10
    assert seen <= {200, 400, 404, 502, 503, 504}
    client.close()
    for node in gw.nodes:
        node.script = []
    assert [gw.post().status_code for _ in range(20)] == [200] * 20
    assert "Traceback" not in Path(gw.process.log).read_text()
