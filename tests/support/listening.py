"""A caller's connection without a network: what it reads, what it starts and what it writes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from corral.gateway.listen import ClientConnection
from corral.gateway.throughput import Throughput
from corral.wire.errors import ApiError


class Stage:
    """A connection whose loop, transport and gateway do what is needed here and no more."""

    def __init__(self) -> None:
        self.started: list[bytes] = []
        self.served: list[tuple[bytes, bytes, bytes]] = []
        """Method, target and body of what was started."""
        self.soon: list[Callable[[], None]] = []
        self.written = b""
        self.closed = False
        self.checked = 0
        gateway: Any = SimpleNamespace(
            loop=SimpleNamespace(call_soon=self.soon.append),
            connections=set(),
            stopping=False,
            max_body=2_000_000,
            max_body_digits=7,
            unfinished=0,
            finished=Throughput(),
            closed=lambda connection: None,
            check_key=self._check_key,
            trusts=lambda peer: False,
            exchange=self._exchange,
            refuse_unread=lambda exchange, error, sent: None,
        )
        self.gateway = gateway
        self.connection = ClientConnection(gateway)
        transport: Any = SimpleNamespace(
            set_write_buffer_limits=lambda high: None,
            get_extra_info=lambda name: ("127.0.0.1", 1),
            write=self._write,
            close=self._close,
            abort=self._abort,
        )
        self.connection.connection_made(transport)

    def _exchange(self, connection: Any, method: bytes, target: bytes, headers: Any) -> Any:
        exchange = SimpleNamespace(body=b"", keep_alive=False, request_id="r1")

        def start() -> None:
            self.started.append(target)
            self.served.append((method, target, exchange.body))
            self.on_start(exchange.keep_alive)

        exchange.start = start
        return exchange

    def on_start(self, keep_alive: bool) -> None:
        """What a request does that begins."""

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        self.checked += 1
        if b"authorization" not in headers:
            raise ApiError(401, "unauthorized", "no API key")

    def _abort(self) -> None:
        self.closed = True

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
