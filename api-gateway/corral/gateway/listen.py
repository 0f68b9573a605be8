"""Step 1: the caller's connection. Strict HTTP/1.1, capped, with deadlines; one request at a time."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Final

import httptools

from corral.gateway import heads
from corral.gateway.admit import DEADLINE
from corral.gateway.route import api_of
from corral.wire import errors, http1, scan
from corral.wire.errors import ApiError, overloaded

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange
    from corral.gateway.server import Gateway

HEADER_BYTES: Final = 32 << 10
HEADER_COUNT: Final = 100
PIPELINE_MAX: Final = 8
HEADER_DEADLINE: Final = 10.0
BODY_DEADLINE: Final = 60.0
BODY_RATE: Final = 16 << 10  # bytes a second; a body may take as much longer as it has of these
BODY_KNOWN: Final = 64 << 10  # more of a body is taken from callers with a key alone
BODIES_MAX = 256 << 20  # of all bodies that are not whole yet
IDLE_DEADLINE: Final = 75.0
WRITE_DEADLINE: Final = 60.0
WRITE_BUFFER: Final = 64 << 10


_ONCE: Final = frozenset(
    (b"authorization", b"x-api-key", b"host", b"content-type", b"x-request-id", b"x-corral-edge-id", DEADLINE)
)


class ClientConnection:
    """A caller's connection, made by the edge. ``sent``: bytes of a streamed answer's body so far, without its end."""

    __slots__ = (
        "_awaited",
        "_body",
        "_body_bytes",
        "_body_since",
        "_broken",
        "_closing",
        "_fed",
        "_feed",
        "_head",
        "_head_bytes",
        "_headers",
        "_headers_done",
        "_last",
        "_modern",
        "_parser",
        "_pieces",
        "_queue",
        "_reading",
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
        self._feed = self._parser.feed_data
        self._reading = self._headers_done = self._last = False
        self._fed = self._head_bytes = self._body_bytes = 0
        self._body_since = 0.0
        self._target = self._body = b""
        self._pieces: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._head = self._headers
        self._queue: deque[Exchange] = deque()
        self.exchange: Exchange | None = None
        self.transport: asyncio.Transport | None = None
        self.deadline = 0.0
        self.stalled_since = 0.0
        self.sent = 0
        self._broken = self._closing = self._awaited = False
        self._modern = True

    @property
    def idle(self) -> bool:
        """Whether no request runs on it, waits, or is on its way."""
        return self.exchange is None and not self._queue and not self._reading

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        transport.set_write_buffer_limits(high=WRITE_BUFFER)  # type: ignore[attr-defined]
        peer = transport.get_extra_info("peername")
        self.peer: str = peer[0] if peer else ""
        self.trusted: bool = self.gateway.trusts(self.peer)
        self.deadline = time.monotonic() + HEADER_DEADLINE
        self.gateway.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._broken:
            return
        self._fed = len(data)
        try:
            if not self._reading and not self._last:
                whole = scan.request(data)
                if whole is not None and len(whole[3]) <= self.gateway.max_body:
                    self._take(*whole)
                    return
            self._feed(data)
            if self._reading:
                self._wait_for_more(len(data))
        except ApiError as error:
            self.reject(error)
        except httptools.HttpParserUpgrade:
            self.reject(ApiError(400, "bad_request", "CONNECT and protocol upgrades are not served here"))
        except httptools.HttpParserCallbackError as failed:
            cause = failed.__context__
            if not isinstance(cause, ApiError):
                raise
            self.reject(cause)
        except httptools.HttpParserError as malformed:
            self.reject(ApiError(400, "bad_request", f"malformed HTTP: {malformed}"))

    def _take(self, method: bytes, target: bytes, headers: dict[bytes, bytes], body: bytes) -> None:
        # A plain request that is at hand whole: the parser, which stands between two requests, would call all of the
        # methods below for it.
        self._target, self._head, self._body = target, headers, body
        self._headers_done = False
        exchange = self.gateway.exchange(self, method, target, headers)
        exchange.body = body
        exchange.keep_alive = True
        self._accept(exchange)

    def _wait_for_more(self, size: int) -> None:
        # Only a message that came in pieces needs a deadline and a count of what may still be the head.
        if self._headers_done:
            if not self._body_since:
                self._body_since = time.monotonic()
            # Not from the last piece: a byte now and then would keep it for ever.
            received = self._body_bytes or len(self._body)
            self.deadline = self._body_since + BODY_DEADLINE + received / BODY_RATE
            return
        if not self._head_bytes:
            self.deadline = time.monotonic() + HEADER_DEADLINE
        self._head_bytes += size
        if self._head_bytes > HEADER_BYTES:
            raise self._head_too_large()

    def eof_received(self) -> bool:
        return False  # a caller that closed its side has left

    def connection_lost(self, exc: Exception | None) -> None:
        self.gateway.closed(self)
        self.gateway.unfinished -= self._body_bytes
        self._pieces, self._body_bytes = [], 0
        self.transport = None
        self._queue.clear()
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_gone()

    def pause_writing(self) -> None:
        self.stalled_since = time.monotonic()
        if self.exchange is not None:
            self.exchange.pause()

    def resume_writing(self) -> None:
        self.stalled_since = 0.0
        if self.exchange is not None:
            self.exchange.resume()

    # -- httptools

    def on_message_begin(self) -> None:
        self._reading = True
        self._headers_done = False
        self._headers = {}
        self._body = self._target = b""
        self._head_bytes = 0
        self._body_since = 0.0

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        headers = self._headers
        if name in headers:
            value = self._repeated(name, value)
        headers[name] = value

    def _repeated(self, name: bytes, value: bytes) -> bytes:
        if name in _ONCE:
            raise ApiError(400, "bad_request", f"the header {name.decode('latin-1')} may be sent once only")
        together = self._headers[name] + b", " + value
        if len(together) > HEADER_BYTES:
            raise self._head_too_large()
        return together

    def _head_too_large(self) -> ApiError:
        return ApiError(431, "headers_too_large", f"the head of a request may have {HEADER_BYTES} bytes")

    def on_headers_complete(self) -> None:
        self._headers_done = True
        headers = self._head = self._headers
        self._headers = {}  # for trailers, which nobody reads
        if len(headers) > HEADER_COUNT:
            raise ApiError(431, "headers_too_large", f"more than {HEADER_COUNT} headers")
        if self._head_bytes + self._fed > HEADER_BYTES:
            self._measure_head()
        length = headers.get(b"content-length")
        coded = b"content-encoding" in headers or b"transfer-encoding" in headers
        if coded or b"expect" in headers or b"upgrade" in headers:
            self._special(headers)
        # What has fewer digits than the cap is below it.
        if length is not None and len(length) >= self.gateway.max_body_digits and int(length) > self.gateway.max_body:
            raise self._too_large()

    def _special(self, headers: dict[bytes, bytes]) -> None:
        http1.refuse_coded(headers)
        if headers.get(b"expect", b"").lower() == b"100-continue" and self._parser.get_http_version() != "1.0":
            self._awaited = True
            self._await()

    def _await(self) -> None:
        # Not within the answer of a request before it, whose caller would take it for a part of that.
        if self._awaited and self.exchange is None and not self._queue:
            self._awaited = False
            self._body_since = 0.0  # from now on it may come
            self._write(http1.CONTINUE)

    def _measure_head(self) -> None:
        # What came may be body as well.
        headers = self._head
        if len(self._target) + sum(map(len, headers)) + sum(map(len, headers.values())) > HEADER_BYTES:
            raise self._head_too_large()

    def on_body(self, data: bytes) -> None:
        size = len(data)
        if not self._body:
            self._body = data
        else:
            self._more(data)
            size = self._body_bytes
        if size > self.gateway.max_body:
            raise self._too_large()

    def _more(self, data: bytes) -> None:
        # What comes in many pieces is put together once.
        gateway, known = self.gateway, self._body_bytes > BODY_KNOWN
        if not self._pieces:
            self._pieces = [self._body]
            self._body_bytes = len(self._body)
            gateway.unfinished += self._body_bytes
        self._pieces.append(data)
        self._body_bytes += len(data)
        gateway.unfinished += len(data)
        if self._body_bytes > BODY_KNOWN and not known:
            gateway.check_key(self._head)
        if gateway.unfinished > BODIES_MAX and gateway.unfinished > gateway.max_body:
            raise self._too_many()

    def _too_many(self) -> ApiError:
        size = int(self._head.get(b"content-length", self._body_bytes))
        more = self.gateway.unfinished - self._body_bytes + size - BODIES_MAX  # to be whole before there is room for it
        return overloaded("too many large bodies are on their way", self.gateway.finished.time_for(more, BODY_DEADLINE))

    def _too_large(self) -> ApiError:
        return ApiError(413, "body_too_large", f"the body may have {self.gateway.max_body} bytes")

    def on_message_complete(self) -> None:
        self._reading = self._awaited = False
        parser = self._parser
        exchange = self.gateway.exchange(self, parser.get_method(), self._target, self._head)
        exchange.body = self._body
        if self._pieces:
            exchange.body = b"".join(self._pieces)
            self.gateway.unfinished -= self._body_bytes
            self.gateway.finished.done(self._body_bytes)
            self._pieces, self._body_bytes = [], 0
        exchange.keep_alive = keep_alive = parser.should_keep_alive()
        # Only what closes or says how to go on can be HTTP/1.0; asking the parser costs as much as finding the route.
        if (not keep_alive or b"connection" in self._head) and parser.get_http_version() != "1.1":
            http1.refuse_version(parser.get_http_version(), self._head)
            exchange.modern = False
        elif b"host" not in self._head:
            raise ApiError(400, "bad_request", "a request of HTTP/1.1 names its host")
        self._last = not keep_alive
        self._accept(exchange)

    def _accept(self, exchange: Exchange) -> None:
        # With none running, one of the queue may be about to: what is read now comes after it.
        if self.exchange is None and not self._queue and not self._closing:
            self._serve(exchange)
        elif len(self._queue) < PIPELINE_MAX:
            self._queue.append(exchange)
        else:
            raise ApiError(400, "bad_request", f"more than {PIPELINE_MAX} pipelined requests")

    def _serve(self, exchange: Exchange) -> None:
        self.deadline = 0.0
        self.sent = 0
        self.exchange = exchange
        if self.gateway.stopping:
            exchange.keep_alive = False
        exchange.start()

    # -- answers

    def reject(self, error: ApiError) -> None:
        """Answer a request that could not be read, and close: what follows cannot be trusted."""
        self._broken = True
        if self._closing:
            return  # what comes behind the last request of a connection has no answer
        if self.exchange is None and not self._queue:
            # The method is known only once the head is whole; who sent half of one named none.
            method = self._parser.get_method() if self._headers_done else b""
            exchange = self.gateway.exchange(self, method, self._target, self._head or self._headers)
            body = errors.render(api_of(self._target), error, exchange.request_id)
            self.gateway.refuse_unread(exchange, error, len(body))
            self.respond(error.status, heads.refusal(error, exchange.request_id, b""), body, keep_alive=False)
        elif self.exchange is not None:
            self._closing = True  # the request that runs is answered first; or the queue's next, which is about to run

    def respond(self, status: int, headers: bytes, body: bytes, keep_alive: bool) -> None:
        """A whole answer; ends the exchange."""
        closing = b"\r\n" if keep_alive else b"Connection: close\r\n\r\n"
        length = str(len(body)).encode()
        # join() is a third of what the % operator of bytes takes.
        parts = (http1.status_line(status), b"Content-Length: ", length, b"\r\n", headers, closing, body)
        self._write(b"".join(parts))
        self._finish(keep_alive)

    def begin(self, headers: bytes, first: bytes, keep_alive: bool, modern: bool) -> None:
        """The head of a streamed answer with its first bytes."""
        self._modern = modern
        self.sent += len(first)
        if modern:
            framing = b"Transfer-Encoding: chunked\r\n" + (b"" if keep_alive else b"Connection: close\r\n")
            first = http1.chunk(first)
        else:
            framing = b"Connection: close\r\n"
        self._write(b"%b%b%b\r\n%b" % (http1.status_line(200), framing, headers, first))

    def whole_stream(self, headers: bytes, data: bytes, keep_alive: bool, modern: bool) -> None:
        """A streamed answer that is at hand whole."""
        self.begin(headers, data, keep_alive, modern)
        self.end(b"", keep_alive)

    def send(self, data: bytes) -> None:
        """More of a streamed answer; not empty."""
        self.sent += len(data)
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
            self.deadline = time.monotonic() + IDLE_DEADLINE
            self._await()

    def _next(self) -> None:
        if self._queue and self.exchange is None and not self._closing:
            self._serve(self._queue.popleft())

    def check(self, now: float) -> None:
        """Close what is late: a head, a body, an idle connection, a reader that takes nothing."""
        late = self.exchange is None and 0.0 < self.deadline <= now
        stalled = self.stalled_since and now - self.stalled_since > WRITE_DEADLINE
        if (late or stalled) and self.transport is not None:
            self.transport.abort()
