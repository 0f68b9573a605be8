"""Requests on one connection: their order, whatever arrives between an answer and the next one's start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.listening import Stage

from corral.gateway import listen, throughput
from corral.gateway.throughput import Throughput
from corral.wire.errors import ApiError


def test_what_is_read_before_the_queue_goes_on_does_not_overtake_it() -> None:
    stage = Stage()
    stage.asks("/1", "/2")
    stage.answer()
    stage.asks("/3")
    assert stage.started == [b"/1"]
    for _ in range(2):
        stage.turn()
        stage.answer()
    assert stage.started == [b"/1", b"/2", b"/3"]
    stage.asks("/4")
    assert stage.started[-1] == b"/4", "with an empty queue a request starts at once"


def test_a_refusal_does_not_overtake_the_queue_either() -> None:
    stage = Stage()
    stage.asks("/1", "/2")
    stage.answer()
    stage.connection.reject(ApiError(400, "bad_request", "no HTTP"))
    assert b" 400 " not in stage.written
    stage.turn()
    assert stage.started == [b"/1", b"/2"]
    stage.answer()
    assert stage.closed


def test_what_comes_behind_the_last_request_has_no_answer() -> None:
    class Server(Stage):
        def on_start(self, keep_alive: bool) -> None:
            self.connection.respond(200, b"", b"", keep_alive)

    server = Server()
    one = b"GET /1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    server.connection.data_received(one + one)
    assert server.closed and server.started == [b"/1"]
    assert server.written.count(b"HTTP/1.1 ") == 1


def test_a_body_is_awaited_once_the_answers_before_it_are_whole() -> None:
    stage = Stage()
    stage.asks("/1", "/2")
    stage.connection.begin(b"", b"a", True, True)
    stage.connection.data_received(HEAD + b"Expect: 100-continue\r\n\r\n")
    stage.connection.send(b"b")
    stage.connection.end(b"", True)
    assert b" 100 " not in stage.written, "it would be a part of the answer"
    stage.turn()
    stage.answer()
    assert stage.written.endswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert stage.written.count(b" 100 ") == 1


def test_a_body_has_its_time_from_when_it_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, now = Stage(), 1000.0
    monkeypatch.setattr(listen, "time", SimpleNamespace(monotonic=lambda: now))
    stage.asks("/1")
    stage.connection.data_received(HEAD + b"Expect: 100-continue\r\n\r\n")
    now += 90.0
    stage.answer()
    stage.connection.data_received(b"x")
    stage.connection.check(now)
    assert not stage.closed


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_who_speaks_an_older_http_is_not_told_to_continue(version: bytes) -> None:
    stage = Stage()
    head = b"Host: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    stage.connection.data_received(b"POST /1 HTTP/" + version + b"\r\n" + head)
    assert (b" 100 " in stage.written) == (version == b"1.1")
    stage.connection.data_received(b"ab")
    assert stage.started == [b"/1"]


HEAD = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n"


def lasts(monkeypatch: pytest.MonkeyPatch, begun: bytes) -> float:
    """For how long (seconds) a caller is heard that sends a byte a second behind a beginning."""
    stage, now = Stage(), 1000.0
    monkeypatch.setattr(listen, "time", SimpleNamespace(monotonic=lambda: now))
    stage.connection.data_received(begun)
    for _ in range(200):
        stage.connection.check(now)
        if stage.closed:
            break
        stage.connection.data_received(b"x")
        now += 1.0
    return now - 1000.0


def test_a_body_of_a_byte_now_and_then_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 55 < lasts(monkeypatch, HEAD + b"\r\n") < 65


def test_a_head_of_a_byte_now_and_then_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 9 < lasts(monkeypatch, b"GET /a HTTP/1.1\r\nX: ") < 12


def test_who_takes_nothing_of_an_answer_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, now = Stage(), 1000.0
    monkeypatch.setattr(listen, "time", SimpleNamespace(monotonic=lambda: now))
    exchange: Any = SimpleNamespace(pause=lambda: None, resume=lambda: None)
    stage.connection.exchange = exchange
    for closed in (False, True):
        stage.connection.pause_writing()
        now += 59.0
        stage.connection.check(now)
        assert not stage.closed
        if not closed:  # it has taken some: its time begins anew
            stage.connection.resume_writing()
    now += 2.0
    stage.connection.check(now)
    assert stage.closed


def test_a_large_body_that_keeps_coming_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, now = Stage(), 1000.0
    monkeypatch.setattr(listen, "time", SimpleNamespace(monotonic=lambda: now))
    stage.connection.data_received(HEAD + b"Authorization: Bearer k\r\n\r\n")
    for _ in range(100):
        now += 1.1
        stage.connection.check(now)
        stage.connection.data_received(bytes(10_000))
    assert (stage.started, stage.closed) == ([b"/a"], False)


def test_of_a_caller_without_a_key_no_large_body_is_taken() -> None:
    stage = Stage()
    stage.connection.data_received(HEAD + b"\r\n")
    for _ in range(6):
        stage.connection.data_received(bytes(10_000))
    assert stage.checked == 0 and stage.gateway.unfinished == 60_000
    for _ in range(3):
        stage.connection.data_received(bytes(10_000))
    assert stage.checked == 1 and b" 401 " in stage.written and stage.closed
    assert b"\r\nX-Request-ID: r1\r\nWWW-Authenticate: Bearer\r\n" in stage.written
    stage.connection.connection_lost(None)
    assert stage.gateway.unfinished == 0


@pytest.mark.parametrize("head", [HEAD, HEAD.replace(b"Content-Length: 1000000", b"Transfer-Encoding: chunked")])
@pytest.mark.parametrize("size", [1, 3, 400_000, 999_999, 1_000_000])
def test_the_bound_of_a_body_is_the_same_in_any_pieces(head: bytes, size: int) -> None:
    """A piece counted twice once: large ones made the bound a half of what it was."""
    for more in (0, 1):
        stage = Stage()
        stage.gateway.max_body = 1_000_000
        stage.connection.data_received(
            head.replace(b"1000000", b"%d" % (1_000_000 + more)) + b"Authorization: k\r\n\r\n"
        )
        sizes = [size, (1_000_000 - size) // 2, 1_000_000 - size - (1_000_000 - size) // 2 + more]
        for piece in filter(None, sizes):
            data = bytes(piece)
            stage.connection.data_received(data if b"chunked" not in head else b"%x\r\n%b\r\n" % (piece, data))
        if b"chunked" in head:
            stage.connection.data_received(b"0\r\n\r\n")
        assert (stage.started == [b"/a"], b" 413 " in stage.written) == (not more, bool(more))


def test_all_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    stage.gateway.max_body = 500_000
    monkeypatch.setattr(listen, "BODIES_MAX", 500_000)
    stage.connection.data_received(HEAD.replace(b"1000000", b"400000") + b"Authorization: Bearer k\r\n\r\n")
    stage.connection.data_received(bytes(200_000))
    stage.connection.data_received(bytes(100_000))
    stage.gateway.unfinished += 300_000  # of others
    stage.connection.data_received(bytes(50_000))
    assert b" 503 " in stage.written and b"\r\nRetry-After: 6" in stage.written and stage.checked == 1
    stage.connection.connection_lost(None)
    assert stage.gateway.unfinished == 300_000


def test_who_finds_no_room_comes_back_when_bodies_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "BODIES_MAX", 500_000)

    def told(finished: Throughput) -> int:
        stage = Stage()
        stage.gateway.max_body, stage.gateway.finished = 500_000, finished
        stage.gateway.unfinished = 450_000  # of others
        stage.connection.data_received(
            b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 250000\r\nAuthorization: Bearer k\r\n\r\n"
        )
        for _ in range(4):
            stage.connection.data_received(bytes(20_000))
        head, _, rest = stage.written.partition(b"\r\nRetry-After: ")
        assert b" 503 " in head
        return int(rest.partition(b"\r\n")[0])

    assert {told(Throughput()) for _ in range(100)} == set(range(60, 67)), "none became whole: until their deadline"
    monkeypatch.setattr(throughput, "monotonic", lambda: 100.0)
    quick = Throughput()
    quick.done(390_000)  # 39 kB/s lately: 200 kB are to be whole before there is room
    assert {told(quick) for _ in range(100)} == {6, 7}


def test_a_body_that_is_whole_counts_no_more() -> None:
    stage = Stage()
    stage.connection.data_received(HEAD + b"Authorization: Bearer k\r\n\r\n")
    for _ in range(10):
        stage.connection.data_received(bytes(100_000))
    assert (stage.started, stage.gateway.unfinished, stage.checked) == ([b"/a"], 0, 1)


WITH_KEY = b"POST /a HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer k\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        [WITH_KEY + b"Content-Length: 1001\r\n\r\n"],
        [WITH_KEY + b"Transfer-Encoding: chunked\r\n\r\n", b"3e9\r\n" + bytes(1001)],
        [WITH_KEY + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1f4\r\n" + bytes(500) + b"\r\n"] * 3],
    ],
    ids=["by its length", "in one piece", "in many pieces"],
)
def test_a_body_has_a_cap(sent: list[bytes]) -> None:
    stage = Stage()
    stage.gateway.max_body, stage.gateway.max_body_digits = 1000, 4
    for piece in sent:
        stage.connection.data_received(piece)
    assert b"HTTP/1.1 413 " in stage.written and stage.closed and not stage.started


@pytest.mark.parametrize(
    "sent",
    [
        [b"GET /" + b"a" * listen.HEADER_BYTES + b" HTTP/1.1\r\nHost: a\r\n\r\n"],
        [b"GET /a HTTP/1.1\r\nHost: a\r\nX: ", *[bytes(1000).replace(b"\0", b"x")] * 40],
        [b"GET /a HTTP/1.1\r\nHost: a\r\n" + b"X: " + b"x" * listen.HEADER_BYTES + b"\r\n\r\n"],
        [b"GET /a HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X%d: x\r\n" % at for at in range(100)) + b"\r\n"],
    ],
    ids=["a target", "in pieces", "in one piece", "many fields"],
)
def test_a_head_has_a_cap(sent: list[bytes]) -> None:
    stage = Stage()
    for piece in sent:
        stage.connection.data_received(piece)
    assert b"HTTP/1.1 431 " in stage.written and stage.closed and not stage.started
