"""Requests on one connection: their order, whatever arrives between an answer and the next one's start."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from corral.gateway.listen import ClientConnection
from corral.wire.errors import ApiError


class Stage:
    """A connection whose loop, transport and gateway do what is needed here and no more."""

    def __init__(self) -> None:
        self.started: list[bytes] = []
        self.soon: list[Callable[[], None]] = []
        self.written = b""
        self.closed = False
        gateway: Any = SimpleNamespace(
            loop=SimpleNamespace(call_soon=self.soon.append),
            connections=set(),
            stopping=False,
            max_body=1000,
            trusts=lambda peer: False,
            exchange=self._exchange,
            refuse_unread=lambda exchange, error, sent: None,
        )
        self.connection = ClientConnection(gateway)
        transport: Any = SimpleNamespace(
            set_write_buffer_limits=lambda high: None,
            get_extra_info=lambda name: ("127.0.0.1", 1),
            write=self._write,
            close=self._close,
        )
        self.connection.connection_made(transport)

    def _exchange(self, connection: Any, method: bytes, target: bytes, headers: Any) -> Any:
        return SimpleNamespace(start=lambda: self.started.append(target))

    def _write(self, data: bytes) -> None:
        self.written += data

    def _close(self) -> None:
        self.closed = True

    def asks(self, *targets: str) -> None:
        self.connection.data_received(b"".join(f"GET {one} HTTP/1.1\r\nHost: a\r\n\r\n".encode() for one in targets))

    def answer(self) -> None:
        self.connection.respond(200, b"", b"", keep_alive=True)

    def turn(self) -> None:
        """The loop's next turn."""
        soon = self.soon[:]
        self.soon.clear()
        for call in soon:
            call()


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
