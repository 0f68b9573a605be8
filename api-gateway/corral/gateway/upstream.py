"""Connections towards the nodes: a pool per address of plain protocols, most recently used first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

import httptools

from corral.gateway.dial import dial
from corral.wire import scan
from corral.wire.errors import UpstreamNonsense

IDLE_MAX: Final = 4.0  # below HAProxy's keep-alive time-out: the pool closes before its peer does
IDLE_COUNT: Final = 256
STALE_WITHIN: Final = 0.02
"""A reused connection that its peer had closed shows that at once; one that ends later took the request along."""

Address = tuple[str, int]


class Handler:
    """Who waits for an answer. Exactly one of ``on_end`` and ``on_lost`` ends it. A base, which compiles to less."""

    __slots__ = ()

    def on_head(self, status: int, proxied: bytes) -> None:
        """The head is whole; `proxied` is empty unless HAProxy made this answer, not the node."""
        raise NotImplementedError

    def on_body(self, data: bytes) -> None:
        """Some of the body, never empty."""
        raise NotImplementedError

    def on_end(self) -> None:
        """The answer is whole."""
        raise NotImplementedError

    def on_lost(self, untouched: bool) -> None:
        """The connection ended before the answer did; `untouched`: a reused one, at once and before any byte."""
        raise NotImplementedError


class UpstreamConnection:
    """One HTTP/1.1 connection; one request at a time."""

    __slots__ = (
        "_body",
        "_complete",
        "_feed",
        "_handler",
        "_headers_done",
        "_keep_alive",
        "_loop",
        "_parser",
        "_paused",
        "_pool",
        "_proxied",
        "_reused",
        "_sent_at",
        "_touched",
        "address",
        "idle_since",
        "transport",
    )

    def __init__(self, pool: Upstreams, address: Address, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self.address = address
        self.transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._handler: Handler | None = None
        self._feed = self._parser.feed_data
        self._body: list[bytes] = []
        self._reused = self._keep_alive = self._paused = False
        self._complete = self._headers_done = self._touched = False
        self._proxied = b""
        self.idle_since = self._sent_at = 0.0

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        handler = self._handler
        if handler is None:
            self.abort()  # bytes that nobody asked for: the connection cannot be trusted
            return
        whole = None if self._touched else scan.response(data)
        self._touched = True
        if whole is not None:
            status, proxied, content = whole
            self._complete = self._keep_alive = True
            if content:
                self._body.append(content)
            handler.on_head(status, proxied)
        else:
            try:
                self._feed(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                self._drop()
                self.abort()
                return
        # Chunks that arrived together go on together.
        body = self._body
        if body and self._handler is handler:
            self._body = []
            handler.on_body(body[0] if len(body) == 1 else b"".join(body))
        if self._complete and self._handler is handler:
            self._handler = None
            self._complete = self._headers_done = self._touched = False
            self._proxied = b""
            # One that is not read because a caller was slow would keep the next one's answer from it.
            if self._keep_alive and self.transport is not None and not self._paused:
                self._reused = True
                self.idle_since = monotonic()
                self._pool.put(self)
            else:
                self.abort()
            handler.on_end()

    def eof_received(self) -> None:
        """The peer closed its side: close."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._pool.forget(self)
        self._drop()

    def pause_writing(self) -> None:
        """One whole request is sent at a time: nothing can be held back."""

    def resume_writing(self) -> None:
        """See `pause_writing`."""

    def _drop(self) -> None:
        handler, self._handler = self._handler, None
        if handler is not None:
            body, self._body = self._body, []
            if body:
                handler.on_body(b"".join(body))
            early = monotonic() - self._sent_at < STALE_WITHIN
            handler.on_lost(self._reused and not self._touched and early)

    # -- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(name) == 14 and name.lower() == b"x-corral-proxy" and not self._headers_done:
            self._proxied = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:
            if self._headers_done:
                raise UpstreamNonsense("a second answer behind the first")
            self._headers_done = True
            if self._handler is not None:
                self._handler.on_head(status, self._proxied)

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        self._complete = self._headers_done  # an interim (1xx) head is no answer
        self._keep_alive = self._parser.should_keep_alive()

    # -- for the holder

    def send(self, request: bytes, handler: Handler) -> None:
        """Send a whole request; `handler` gets the answer."""
        self._handler = handler
        self._sent_at = monotonic()
        assert self.transport is not None
        self.transport.write(request)

    def pause(self) -> None:
        """Stop reading: the client cannot take more now."""
        if self.transport is not None and self._handler is not None:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self.transport is not None and self._handler is not None:
            self._paused = False
            self.transport.resume_reading()

    def abort(self) -> None:
        """Close at once; the handler of a request that still runs hears nothing more."""
        self._handler = None
        transport, self.transport = self.transport, None
        if transport is not None:
            transport.abort()


class Upstreams:
    """The pool."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._idle: dict[Address, list[UpstreamConnection]] = {}
        self._connecting: set[asyncio.Task[None]] = set()

    def idle(self, address: Address) -> UpstreamConnection | None:
        """The connection that was used last, if one is idle."""
        idle = self._idle.get(address)
        return idle.pop() if idle else None

    def connect(self, address: Address, done: Callable[[UpstreamConnection | OSError], None]) -> None:
        """Make a connection; `done` gets it, or why there is none."""
        made: Callable[[], Any] = lambda: UpstreamConnection(self, address, self._loop)  # noqa: E731
        task = self._loop.create_task(dial(self._loop, made, address, done))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def put(self, connection: UpstreamConnection) -> None:
        """Take back a connection whose answer is whole."""
        idle = self._idle.get(connection.address)
        if idle is None:
            idle = self._idle[connection.address] = []
        if len(idle) >= IDLE_COUNT:
            connection.abort()
        else:
            idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        """A connection ended."""
        idle = self._idle.get(connection.address)
        if idle and connection in idle:
            idle.remove(connection)

    def sweep(self, now: float) -> None:
        """Close what was idle too long. `now` is monotonic seconds."""
        for address, idle in self._idle.items():
            stale = [connection for connection in idle if now - connection.idle_since > IDLE_MAX]
            self._idle[address] = [connection for connection in idle if connection not in stale]
            for connection in stale:
                connection.abort()

    def close(self) -> None:
        """Close all idle connections."""
        for idle in self._idle.values():
            for connection in list(idle):
                connection.abort()
