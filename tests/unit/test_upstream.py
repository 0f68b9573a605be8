"""A node's answer as it is read."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from corral.gateway.upstream import UpstreamConnection, Upstreams


class Waiting:
    """Who waits for an answer; ``on_piece`` is called with each piece of its body."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.on_piece: Callable[[], None] = lambda: None

    def on_head(self, status: int, proxied: bytes) -> None:
        self.told.append(status)

    def on_body(self, data: bytes) -> None:
        self.told.append(data)
        self.on_piece()

    def on_end(self) -> None:
        self.told.append("end")

    def on_lost(self, untouched: bool) -> None:
        self.told.append("lost")


ONE = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\none"
TWO = b"HTTP/1.1 404 No\r\nContent-Length: 3\r\n\r\ntwo"


def read(*pieces: bytes, pauses: str = "") -> tuple[list[Any], bool]:
    """What the one who waits is told, and whether the connection is kept. `pauses`: what it does at each piece."""
    loop: Any = SimpleNamespace()
    pool = Upstreams(loop)
    connection = UpstreamConnection(pool, ("a", 1), loop)
    nothing: Any = lambda *_: None  # noqa: E731
    transport: Any = SimpleNamespace(write=nothing, abort=nothing, pause_reading=nothing, resume_reading=nothing)
    connection.connection_made(transport)
    waiting = Waiting()

    def pause() -> None:
        for name in pauses.split():
            getattr(connection, name)()

    waiting.on_piece = pause
    connection.send(b"", waiting)
    for piece in pieces:
        connection.data_received(piece)
    return waiting.told, connection.transport is not None


def test_an_answer_is_told_and_its_connection_kept() -> None:
    assert read(ONE) == ([200, b"one", "end"], True)


def test_a_second_answer_behind_the_first_is_not_mixed_with_it() -> None:
    assert read(ONE + TWO) == ([200, b"one", "lost"], False)
    assert read(ONE, TWO) == ([200, b"one", "end"], False)
    assert read(ONE[:-1], ONE[-1:] + TWO) == ([200, b"on", b"e", "lost"], False)


def test_a_connection_that_is_not_read_is_no_use_to_the_next_one() -> None:
    """A node that ends in the midst, before a caller that takes nothing: the pool is that of all nodes."""
    assert read(ONE, pauses="pause") == ([200, b"one", "end"], False)
    assert read(ONE, pauses="pause resume") == ([200, b"one", "end"], True)
