"""A node's answer as it is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from corral.gateway.upstream import UpstreamConnection, Upstreams


class Waiting:
    """Who waits for an answer."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_head(self, status: int, proxied: bytes) -> None:
        self.told.append(status)

    def on_body(self, data: bytes) -> None:
        self.told.append(data)

    def on_end(self) -> None:
        self.told.append("end")

    def on_lost(self, untouched: bool) -> None:
        self.told.append("lost")


ONE = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\none"
TWO = b"HTTP/1.1 404 No\r\nContent-Length: 3\r\n\r\ntwo"


def read(*pieces: bytes) -> tuple[list[Any], bool]:
    """What the one who waits is told, and whether the connection is kept."""
    loop: Any = SimpleNamespace()
    pool = Upstreams(loop)
    connection = UpstreamConnection(pool, ("a", 1), loop)
    transport: Any = SimpleNamespace(write=lambda data: None, abort=lambda: None)
    connection.connection_made(transport)
    waiting = Waiting()
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
