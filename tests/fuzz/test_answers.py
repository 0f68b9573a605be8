"""What nodes send: a head, chunks and lines of any bytes end a request once, and go to no caller as nonsense."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st
from support.fuzz import PLACES, PUNCTUATION, changes, cuts, fuzz, mutated

from corral.gateway.upstream import UpstreamConnection, Upstreams
from corral.wire.common import CAPS
from corral.wire.decode import DECODERS
from corral.wire.errors import ApiError, UpstreamNonsense

CHAT = [
    b'{"model":"m","created_at":"x","message":{"role":"assistant","content":"a"},"done":false}\n',
    b'{"model":"m","message":{"role":"assistant","content":"","thinking":"b"},"done":false}\n',
    b'{"model":"m","message":{"content":"","tool_calls":[{"id":"1","function":{"name":"f","arguments":{}}}]}}\n',
    b'{"model":"m","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","eval_count":2}\n',
]
GENERATE = [
    b'{"model":"m","response":"a","done":false}\n',
    b'{"model":"m","response":"","done":true,"context":[1],"prompt_eval_count":1,"eval_count":1}\n',
]
EMBED = [b'{"model":"m","embeddings":[[0.1,0.2]],"prompt_eval_count":1}']
LINES = {"/api/chat": CHAT, "/api/generate": GENERATE, "/api/embed": EMBED}
TOKENS = [
    *(
        *PUNCTUATION,
        b"\n",
        b"null",
        b"1e999",
        b"-1",
        b"true",
        b'"done":true',
        b'"error":"e"',
    ),
    *(b"\\ud800", b"\xff", b" ", b"[" * 2000, b'"message":null', b'"content":5', b"0" * 30, b'"eval_count":"x"'),
]


def check_lines(route: str, stream: bool, picks: list[int], edits: Any, places: list[int]) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "prompt": "a", "input": "a", "max_tokens": 9}
    decoded = DECODERS[route](json.dumps(body | {"stream": stream}).encode(), "r1", lambda model: None, CAPS)
    lines = LINES.get(decoded.upstream_path.decode(), EMBED)
    data = mutated(b"".join(lines[pick % len(lines)] for pick in picks) + lines[-1], edits)
    responder = decoded.responder
    out = b""
    try:
        for piece in cuts(data, places):
            out += responder.feed(piece)
            if responder.error is not None:
                assert isinstance(responder.error, ApiError) and isinstance(responder.error.message, str)
                return
        if not responder.done:
            return
        out += responder.finish()
    except UpstreamNonsense as nonsense:
        str(nonsense).encode("utf-8", "surrogatepass")
        return
    assert 0 <= responder.tokens < 1 << 31 and 0 <= responder.prompt_tokens < 1 << 31
    if not responder.stream:
        # A native answer has its last line's other fields as the node wrote them, whatever their letters.
        native = route.startswith("/api/")
        assert isinstance(json.loads(out.decode("utf-8", "replace") if native else out), dict)
        return
    if route in ("/api/chat", "/api/generate"):
        return  # a native stream passes on lines as the node wrote them
    for line in out.split(b"\n"):
        if line.startswith(b"data: "):
            line = line[6:]
        elif line.startswith(b"event: "):
            assert line[7:].replace(b"_", b"").isalpha()
            continue
        if line.strip() and line != b"[DONE]":
            assert isinstance(json.loads(line), dict)


def test_lines() -> None:
    routes = st.sampled_from(sorted(set(DECODERS) - {"/api/show"}))
    picks = st.lists(st.integers(0, 9), max_size=4)
    assert fuzz(check_lines, routes, st.booleans(), picks, changes(*TOKENS), PLACES) > 100


HEADS = [
    b"HTTP/1.1 200 OK\r\nContent-Type: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 No\r\nX-Corral-Proxy: haproxy\r\nContent-Length: 2\r\n\r\nno",
    b"HTTP/1.0 200 OK\r\n\r\nhello",
    b"HTTP/1.1 204 None\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nx",
]
HEAD_TOKENS = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"0\r\n\r\n", b"5\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/9.9", b"99999"),
    *(b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"ffffffffffffffffff\r\n"),
]


class Waiting:
    """Who waits for an answer."""

    def __init__(self) -> None:
        self.heads: list[int] = []
        self.body = b""
        self.ends: list[str] = []

    def on_head(self, status: int, proxied: bytes) -> None:
        assert not self.ends
        self.heads.append(status)

    def on_body(self, data: bytes) -> None:
        assert data and not self.ends and self.heads
        self.body += data

    def on_end(self) -> None:
        self.ends.append("end")

    def on_lost(self, untouched: bool) -> None:
        self.ends.append("lost")


def read(data: bytes, places: list[int]) -> tuple[list[int], bytes, list[str], bool]:
    """Heads, body and end of one answer, and whether the connection is used again."""
    loop: Any = SimpleNamespace()
    pool = Upstreams(loop)
    made = UpstreamConnection(pool, ("a", 1), loop)
    made.connection_made(SimpleNamespace(write=lambda data: None, abort=lambda: None))  # type: ignore[arg-type]
    waiting = Waiting()
    made.send(b"", waiting)
    for piece in cuts(data, places):
        if made.transport is None:
            break
        made.data_received(piece)
    again = pool.idle(("a", 1)) is made
    if again:
        pool.put(made)
    made.connection_lost(None)
    assert pool.idle(("a", 1)) is None
    return waiting.heads, waiting.body, waiting.ends, again


def check_heads(heads: list[int], edits: Any, first: list[int], second: list[int]) -> None:
    data = mutated(b"".join(HEADS[pick % len(HEADS)] for pick in heads), edits)
    if not data:
        return
    one, other = read(data, first), read(data, second)
    for waiting in (one, other):
        assert len(waiting[2]) == 1, "ended once"
        assert len(waiting[0]) <= 1 and all(status >= 200 for status in waiting[0])
    if one[2] == ["end"] == other[2]:
        assert one[:2] == other[:2], "the cuts mean nothing"


def test_heads() -> None:
    picks = st.lists(st.integers(0, 9), min_size=1, max_size=2)
    assert fuzz(check_heads, picks, changes(*HEAD_TOKENS), PLACES, PLACES) > 100
