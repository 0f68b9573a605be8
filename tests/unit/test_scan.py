"""What is read at once in C (`corral/wire/_scan.c`) is what llhttp reads, or is left to it."""

from __future__ import annotations

import shutil
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import httptools
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.fuzz import PLACES, changes, cuts, mutated
from support.listening import Stage
from support.native import load
from support.smuggling import body, chunked, corpus, request

from corral.gateway.upstream import UpstreamConnection, Upstreams
from corral.wire import scan as by_module

KEY = b"Bearer k"
PLAIN = request(KEY, body("open"), extra=b"X-Forwarded-For: 192.0.2.7\r\nContent-Type: application/json\r\n")
GET = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nContent-Length: 5\r\n\r\nhello"
CHUNKS = b"HTTP/1.1 503 No\r\nX-Corral-Proxy: no-server\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(body("open"))
TOKENS = (
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b";", b",", b"_", b"-", b"+", b"\x7f", b"\x80", b"A", b"f"),
    *(b"0\r\n\r\n", b"5\r\n", b"\r\n\r\n", b"HTTP/1.0", b"HTTP/1.1", b"GET ", b"POST ", b"HEAD ", b"204", b"304"),
    *(b"Content-Length: 5\r\n", b"content-length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n"),
    *(b"Proxy-Connection: close\r\n", b"Upgrade: x\r\n", b"Expect: 100-continue\r\n", b"Content-Encoding: gzip\r\n"),
    *(b"Trailer: x\r\n", b"x-corral-proxy: y\r\n", b"Host: b\r\n", b"X:\r\n", b"X: y \r\n", b"X: y\r\n z\r\n"),
    *(b"a: " + b"b" * 17000 + b"\r\n", b"00000000000000005"),
)
REQUESTS = (PLAIN, GET, *(case.raw for case in corpus(KEY)))
ANSWERS = (ANSWER, CHUNKS)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    return load("wire/_scan.c", tmp_path_factory.mktemp("scan"))


class Read:
    """What llhttp makes of some bytes: messages, and whether the last is whole and keeps its connection."""

    def __init__(self, kind: Any, data: bytes) -> None:
        self.begun = self.ended = 0
        self.kept = False
        self.target = self.body = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.parser = kind(self)
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.begun += 1

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.ended += 1
        self.kept = self.parser.should_keep_alive()  # it tells that of a message that has just ended

    def one(self) -> bool:
        """Whether it is one whole message of HTTP/1.1, with no header twice, on a connection that is kept."""
        once = len(dict(self.headers)) == len(self.headers)
        kept = self.kept and self.parser.get_http_version() == "1.1"
        return (self.begun, self.ended) == (1, 1) and kept and once


def same_request(scan: ModuleType, data: bytes) -> bool:
    """Whether it was read here; then llhttp has read the same."""
    found = scan.request(data)
    if found is None:
        return False
    by = Read(httptools.HttpRequestParser, data)
    assert by.one()
    assert found == (by.parser.get_method(), by.target, dict(by.headers), by.body)
    framing = {b"transfer-encoding", b"connection", b"upgrade", b"expect", b"content-encoding"}
    assert b"host" in found[2] and not framing & set(found[2])
    return True


def same_response(scan: ModuleType, data: bytes) -> bool:
    """The same of an answer."""
    found = scan.response(data)
    if found is None:
        return False
    by = Read(httptools.HttpResponseParser, data)
    assert (by.begun, by.ended) == (1, 1) and by.kept
    marks = [value for name, value in by.headers if name == b"x-corral-proxy"]
    assert len(marks) <= 1
    assert found == (by.parser.get_status_code(), marks[0] if marks else b"", by.body)
    return True


@pytest.mark.parametrize("data", [PLAIN, GET, PLAIN.replace(b": ", b":", 1), request(KEY, b"x" * 100_000)])
def test_a_plain_request_is_read(scan: ModuleType, data: bytes) -> None:
    assert same_request(scan, data)


@pytest.mark.parametrize("data", [ANSWER, CHUNKS, ANSWER.replace(b": 5", b": 0").removesuffix(b"hello")])
def test_a_plain_answer_is_read(scan: ModuleType, data: bytes) -> None:
    assert same_response(scan, data)


def test_what_is_cut_or_followed_by_more_is_left_to_the_parser(scan: ModuleType) -> None:
    for data in (PLAIN, GET):
        assert not any(scan.request(data[:end]) for end in range(len(data)))
        assert scan.request(data + b"G") is None and scan.request(data + data) is None
    for data in (ANSWER, CHUNKS):
        assert not any(scan.response(data[:end]) for end in range(len(data)))
        assert scan.response(data + b"H") is None and scan.response(data + data) is None


def test_nothing_but_bytes_is_taken(scan: ModuleType) -> None:
    for function in (scan.request, scan.response):
        for other in ("text", bytearray(PLAIN), None, 1):
            with pytest.raises(TypeError):
                function(other)


def test_of_ambiguous_requests_those_that_a_gateway_must_refuse_are_left_to_the_parser(scan: ModuleType) -> None:
    for case in corpus(KEY):
        if case.strict:
            assert scan.request(case.raw) is None, case.name


@settings(max_examples=3000, deadline=None, database=None)
@given(st.sampled_from(REQUESTS), changes(*TOKENS))
@example(PLAIN, [])
def test_requests_are_read_as_llhttp_reads_them(scan: ModuleType, data: bytes, edits: Any) -> None:
    same_request(scan, mutated(data, edits))


@settings(max_examples=3000, deadline=None, database=None)
@given(st.sampled_from(ANSWERS), changes(*TOKENS))
@example(ANSWER, [])
def test_answers_are_read_as_llhttp_reads_them(scan: ModuleType, data: bytes, edits: Any) -> None:
    same_response(scan, mutated(data, edits))


class Server(Stage):
    """Answers at once."""

    def on_start(self, keep_alive: bool) -> None:
        self.connection.respond(200, b"", b"ok", keep_alive)


def served(pieces: list[bytes]) -> Any:
    """What a caller's connection makes of them."""
    server = Server()
    for piece in pieces:
        if not server.closed:
            server.connection.data_received(piece)
            while server.soon:
                server.turn()
    return server.served, server.written, server.closed


def told(pieces: list[bytes]) -> Any:
    """What one who waits for a node's answer hears, and whether the connection is kept."""
    heard: list[Any] = []
    waiting: Any = SimpleNamespace(
        on_head=lambda status, proxied: heard.append((status, proxied)),
        on_body=heard.append,
        on_end=lambda: heard.append("end"),
        on_lost=lambda untouched: heard.append("lost"),
    )
    loop: Any = SimpleNamespace()
    connection = UpstreamConnection(Upstreams(loop), ("a", 1), loop)
    transport: Any = SimpleNamespace(write=lambda data: None, abort=lambda: None)
    connection.connection_made(transport)
    connection.send(b"", waiting)
    for piece in pieces:
        connection.data_received(piece)
        if heard[-1:] == ["end"] and connection.transport is not None:
            connection.send(b"", waiting)
    return heard, connection.transport is not None


@settings(max_examples=1000, deadline=None, database=None)
@given(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=3), changes(*TOKENS), PLACES)
@example([PLAIN, PLAIN], [], [len(PLAIN)])
def test_a_connection_serves_the_same_with_it(scan: ModuleType, sent: Any, edits: Any, places: Any) -> None:
    pieces = cuts(mutated(b"".join(sent), edits), places)
    without = served(pieces)
    with patch.object(by_module, "request", scan.request):
        assert served(pieces) == without


@settings(max_examples=1000, deadline=None, database=None)
@given(st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=3), changes(*TOKENS), PLACES)
@example([ANSWER, ANSWER], [], [len(ANSWER)])
def test_a_node_is_heard_the_same_with_it(scan: ModuleType, sent: Any, edits: Any, places: Any) -> None:
    pieces = cuts(mutated(b"".join(sent), edits), places)
    without = told(pieces)
    with patch.object(by_module, "response", scan.response):
        assert told(pieces) == without


def test_each_single_byte_that_differs_is_read_as_llhttp_reads_it(scan: ModuleType) -> None:
    read = 0
    for at in range(len(PLAIN) - len(body("open"))):
        for byte in range(256):
            read += same_request(scan, PLAIN[:at] + bytes([byte]) + PLAIN[at + 1 :])
    for data in ANSWERS:
        for at in range(len(data)):
            for byte in range(256):
                read += same_response(scan, data[:at] + bytes([byte]) + data[at + 1 :])
    assert read > 10_000
