"""Step 1: the caller's connection. Strict HTTP/1.1, capped, with deadlines; one request at a time."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

import httptools

from corral.gateway.route import api_of
from corral.wire import errors, http1
from corral.wire.errors import ApiError

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange
    from corral.gateway.server import Gateway

HEADER_BYTES = 32 << 10
HEADER_COUNT = 100
PIPELINE_MAX = 8
HEADER_DEADLINE = 10.0
BODY_DEADLINE = 60.0
IDLE_DEADLINE = 75.0
WRITE_DEADLINE = 60.0
WRITE_BUFFER = 64 << 10


class Request:
    """One request as it was read. ``headers`` has lower-case names; ``arrived`` is monotonic seconds."""

    __slots__ = ("arrived", "body", "headers", "keep_alive", "method", "modern", "target", "wall")

    def __init__(self) -> None:
        self.method = b""
        self.target = b""
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.keep_alive = True
        self.modern = True  # HTTP/1.1: chunks may be used
        self.arrived = 0.0
        self.wall = 0.0


_ONCE = frozenset((b"authorization", b"x-api-key", b"host", b"content-type", b"x-request-id", b"x-corral-edge-id"))
_CORRAL = b"x-corral-"


class ClientConnection(asyncio.Protocol):
    """A caller's connection, made by the edge."""

    __slots__ = (
        "_body",
        "_broken",
        "_closing",
        "_header_bytes",
        "_headers_done",
        "_modern",
        "_parser",
        "_queue",
        "_request",
        "_target",
        "deadline",
        "exchange",
        "gateway",
        "peer",
        "sent",
        "stalled_since",
        "transport",
        "trusted",
    )

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[Request] = deque()
        self.exchange: Exchange | None = None
        self.transport: asyncio.Transport | None = None
        self.deadline = 0.0
        self.stalled_since = 0.0
        self.sent = 0
        self._broken = self._closing = False
        self._modern = True

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        transport.set_write_buffer_limits(high=WRITE_BUFFER)  # type: ignore[attr-defined]
        peer = transport.get_extra_info("peername")
        self.peer: str = peer[0] if peer else ""
        self.trusted: bool = self.gateway.trusts(self.peer)
        self.deadline = self.gateway.loop.time() + HEADER_DEADLINE
        self.gateway.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._broken:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.reject(ApiError(400, "bad_request", "CONNECT and protocol upgrades are not served here"))
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if not isinstance(cause, ApiError):
                raise
            self.reject(cause)
        except httptools.HttpParserError as error:
            self.reject(ApiError(400, "bad_request", f"malformed HTTP: {error}"))

    def eof_received(self) -> bool:
        return False  # a caller that closed its side has left

    def connection_lost(self, exc: Exception | None) -> None:
        self.gateway.closed(self)
        self.transport = None
        self._queue.clear()
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_gone()

    def pause_writing(self) -> None:
        self.stalled_since = self.gateway.loop.time()
        if self.exchange is not None:
            self.exchange.pause()

    def resume_writing(self) -> None:
        self.stalled_since = 0.0
        if self.exchange is not None:
            self.exchange.resume()

    # -- httptools

    def on_message_begin(self) -> None:
        self._request = Request()
        self._body: list[bytes] = []
        self._target = b""
        self._header_bytes = 0
        self._headers_done = False
        self.deadline = self.gateway.loop.time() + HEADER_DEADLINE

    def on_url(self, url: bytes) -> None:
        self._target += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._headers_done:
            return  # a trailer: read past
        self._count(len(name) + len(value))
        headers = self._request.headers
        name = name.lower()
        if name in headers:
            if name in _ONCE:
                raise ApiError(400, "bad_request", f"the header {name.decode('latin-1')} may be sent once only")
            value = headers[name] + b", " + value
        headers[name] = value
        if len(headers) > HEADER_COUNT:
            raise ApiError(431, "headers_too_large", f"more than {HEADER_COUNT} headers")

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > HEADER_BYTES:
            raise ApiError(431, "headers_too_large", f"the head of a request may have {HEADER_BYTES} bytes")

    def on_headers_complete(self) -> None:
        self._headers_done = True
        request = self._request
        headers = request.headers
        request.method = self._parser.get_method()
        request.target = self._target
        request.modern = self._parser.get_http_version() == "1.1"
        if b"upgrade" in headers:
            raise ApiError(400, "bad_request", "protocol upgrades are not served here")
        if b"content-encoding" in headers and headers[b"content-encoding"].lower() != b"identity":
            raise ApiError(415, "unsupported_encoding", "a compressed body is not accepted: send it plain")
        length = headers.get(b"content-length")
        if length is not None and int(length) > self.gateway.max_body:
            raise self._too_large()
        if headers.get(b"expect", b"").lower() == b"100-continue" and self.transport is not None:
            self.transport.write(http1.CONTINUE)
        self.deadline = self.gateway.loop.time() + BODY_DEADLINE

    def on_body(self, data: bytes) -> None:
        self._body.append(data)
        self._header_bytes += len(data)
        if self._header_bytes > self.gateway.max_body + HEADER_BYTES:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, "body_too_large", f"the body may have {self.gateway.max_body} bytes")

    def on_message_complete(self) -> None:
        request = self._request
        body = self._body
        request.body = body[0] if len(body) == 1 else b"".join(body)
        request.keep_alive = self._parser.should_keep_alive()
        request.arrived = self.gateway.loop.time()
        request.wall = time.time()
        if self.exchange is None and not self._closing:
            self._serve(request)
        elif len(self._queue) < PIPELINE_MAX:
            self._queue.append(request)
        else:
            raise ApiError(400, "bad_request", f"more than {PIPELINE_MAX} pipelined requests")

    def _serve(self, request: Request) -> None:
        self.deadline = 0.0
        self.sent = 0
        self.exchange = exchange = self.gateway.exchange(self, request)
        exchange.start()

    # -- answers

    def reject(self, error: ApiError) -> None:
        """Answer a request that could not be read, and close: what follows cannot be trusted."""
        self._broken = True
        if self.exchange is None:
            target = getattr(self, "_target", b"")
            body = errors.render(api_of(target), error)
            self.gateway.refuse_unread(self, error, len(body))
            self.respond(error.status, b"Content-Type: application/json\r\n", body, keep_alive=False)
        elif self.transport is not None:
            self._closing = True  # the request that runs is answered first

    def respond(self, status: int, headers: bytes, body: bytes, keep_alive: bool) -> None:
        """A whole answer; ends the exchange."""
        self._write(
            b"%bContent-Length: %d\r\n%b%b\r\n%b"
            % (
                http1.status_line(status),
                len(body),
                headers,
                b"" if keep_alive else b"Connection: close\r\n",
                body,
            )
        )
        self._finish(keep_alive)

    def begin(self, headers: bytes, first: bytes, request: Request) -> None:
        """The head of a streamed answer with its first bytes."""
        self._modern = request.modern
        if request.modern:
            framing = b"Transfer-Encoding: chunked\r\n" + (b"" if request.keep_alive else b"Connection: close\r\n")
            first = http1.chunk(first)
        else:
            framing = b"Connection: close\r\n"
        self._write(b"%b%b%b\r\n%b" % (http1.status_line(200), framing, headers, first))

    def whole_stream(self, headers: bytes, data: bytes, request: Request) -> None:
        """A streamed answer that is at hand whole."""
        self.begin(headers, data, request)
        self.end(b"", request.keep_alive)

    def send(self, data: bytes) -> None:
        """More of a streamed answer; not empty."""
        self._write(b"%x\r\n%b\r\n" % (len(data), data) if self._modern else data)

    def end(self, data: bytes, keep_alive: bool) -> None:
        """The last bytes of a streamed answer."""
        if self._modern:
            self._write((http1.chunk(data) if data else b"") + http1.LAST_CHUNK)
        elif data:
            self._write(data)
        self._finish(keep_alive and self._modern)

    def _write(self, data: bytes) -> None:
        if self.transport is not None:
            self.sent += len(data)
            self.transport.write(data)

    def _finish(self, keep_alive: bool) -> None:
        self.exchange = None
        if not keep_alive or self._closing or self._broken or self.gateway.stopping:
            self._closing = True
            if self.transport is not None:
                self.transport.close()
        elif self._queue:
            self.gateway.loop.call_soon(self._next)
        else:
            self.deadline = self.gateway.loop.time() + IDLE_DEADLINE

    def _next(self) -> None:
        if self._queue and self.exchange is None and not self._closing:
            self._serve(self._queue.popleft())

    def check(self, now: float) -> None:
        """Close what is late: a head, a body, an idle connection, a reader that takes nothing."""
        late = self.exchange is None and 0.0 < self.deadline <= now
        stalled = self.stalled_since and now - self.stalled_since > WRITE_DEADLINE
        if (late or stalled) and self.transport is not None:
            self.transport.abort()
