"""The client: HTTP/1.1 over asyncio with httptools, a pool of connections, the time of each arrival of bytes.

A general client spends several times as much on a request (docs/performance.md), and what the client spends
is measured as the server's latency. Redirects are not followed; proxies of the environment are not used.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from time import perf_counter

import httptools

from corral.loadtest import answers
from corral.loadtest.answers import CONNECT, LOST, TIMEOUT, Reader
from corral.loadtest.guard import Target

_KEPT = frozenset({b"x-corral-node", b"x-corral-attempts", b"x-corral-queue-ms", b"retry-after"})
_REFUSAL_MAX = 64 << 10
CONNECT_TIMEOUT = 10.0


@dataclass(slots=True)
class Answer:
    """What came of one request. Times are monotonic seconds, 0.0 where it did not come to it.

    ``kind`` and ``reason`` as in `answers`; ``headers`` are those of Corral and Retry-After, lower-case names.
    """

    reader: Reader
    sent: float = 0.0
    first_byte: float = 0.0
    ended: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = ""
    reason: str = ""
    body: bytes = b""
    """Of a status other than 200."""


class _Lost(Exception):
    """The connection ended; ``begun`` if some of the answer was there."""


class Connection(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.idle_since = 0.0
        self.usable = True
        self._parser: httptools.HttpResponseParser | None = None
        self._answer: Answer | None = None
        self._done: asyncio.Future[None] | None = None
        self._framed = False
        self._now = 0.0

    async def exchange(self, request: bytes, answer: Answer) -> None:
        """Send a request and read its answer to the end. Raises _Lost, or ValueError for what is no HTTP."""
        if self.transport is None or not self.usable:
            raise _Lost
        self._parser, self._answer = httptools.HttpResponseParser(self), answer
        self._framed = False
        self._done = asyncio.get_running_loop().create_future()
        answer.sent = perf_counter()
        self.transport.write(request)
        try:
            await self._done
        finally:
            if not self._done.done() or self._done.cancelled() or not self.usable:
                self.close()
            self._answer = self._done = None

    def close(self) -> None:
        """End it at once."""
        self.usable = False
        if self.transport is not None:
            self.transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        answer = self._answer
        if answer is None or self._parser is None:
            self.close()  # bytes that nobody asked for
            return
        if not answer.first_byte:
            answer.first_byte = self._now
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.usable = False
            self._end(ValueError(str(error) or type(error).__name__))

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        answer = self._answer
        if answer is None:
            return
        self._now = perf_counter()
        if answer.status and not self._framed and exc is None:
            self._complete(clean=True)  # a body without a length ends with its connection
        else:
            self._end(_Lost())

    # -- httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._framed = True
        elif name in _KEPT and self._answer is not None:
            self._answer.headers[name.decode()] = value.decode("latin-1")[:200]

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        if self._answer is not None and self._parser.get_status_code() >= 200:
            self._answer.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            return
        if answer.status == 200:
            answer.reader.feed(data, self._now)
        elif len(answer.body) < _REFUSAL_MAX:
            answer.body += data

    def on_message_complete(self) -> None:
        if self._answer is None or not self._answer.status:
            return
        assert self._parser is not None
        self.usable = self.usable and self._parser.should_keep_alive()
        self._complete(clean=True)

    def _complete(self, clean: bool) -> None:
        answer = self._answer
        assert answer is not None
        if answer.status == 200:
            answer.kind, answer.reason = answer.reader.finish(clean, self._now)
        else:
            answer.kind, answer.reason = answers.refusal(answer.status, answer.body)
        answer.ended = self._now
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            if error is None:
                self._done.set_result(None)
            else:
                self._done.set_exception(error)


class Client:
    """A pool of connections to one target; as many as there are requests at a time.

    ``connected`` counts connections that were made; ``again`` requests sent once more because a kept connection
    had ended before any byte of their answer.
    """

    IDLE_MAX = 4.0
    """Seconds after which a kept connection is not used again: servers close theirs from five on."""

    def __init__(self, target: Target, tls: ssl.SSLContext | None = None) -> None:
        self._target, self._tls = target, tls
        self._idle: list[Connection] = []
        self.connected = self.again = 0

    async def ask(self, request: bytes, reader: Reader, within: float) -> Answer:
        """Send a request; what came of it ``within`` seconds, whatever that is. Cancelling closes its connection."""
        answer = Answer(reader, sent=perf_counter())
        try:
            async with asyncio.timeout(within):
                await self._ask(request, answer)
        except TimeoutError:
            when = "after the first token" if answer.reader.times else "before the first token"
            self._failed(answer, TIMEOUT, f"{within:g} s, {when}" if answer.sent else "no connection in time")
        return answer

    async def _ask(self, request: bytes, answer: Answer) -> None:
        while True:
            kept = self._take()
            connection = kept
            if connection is None:
                try:
                    connection = await self._connect()
                except (OSError, ssl.SSLError) as error:
                    self._failed(answer, CONNECT, _reason(error))
                    return
            try:
                await connection.exchange(request, answer)
            except _Lost:
                if kept is not None and not answer.first_byte:
                    self.again += 1
                    continue
                if answer.status == 200:
                    kind, reason = answer.reader.finish(False, perf_counter())
                    self._failed(answer, kind, reason)
                elif answer.status:
                    self._failed(answer, *answers.refusal(answer.status, answer.body))
                else:
                    self._failed(answer, LOST, "before an answer" if not answer.first_byte else "within the head")
                return
            except ValueError as error:
                self._failed(answer, answers.BAD_ANSWER, f"no HTTP: {error}"[:160])
                return
            if connection.usable:
                connection.idle_since = perf_counter()
                self._idle.append(connection)
            return

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and perf_counter() - connection.idle_since < self.IDLE_MAX:
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        name = self._target.host if self._tls else None
        async with asyncio.timeout(CONNECT_TIMEOUT):
            _, connection = await loop.create_connection(
                Connection, self._target.address, self._target.port, ssl=self._tls, server_hostname=name
            )
        self.connected += 1
        return connection

    def _failed(self, answer: Answer, kind: str, reason: str) -> None:
        answer.kind, answer.reason, answer.ended = kind, reason, perf_counter()

    async def close(self) -> None:
        """Close what is kept."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        await asyncio.sleep(0)  # the transports' own callbacks


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"no connection within {CONNECT_TIMEOUT:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted: {error.verify_message}"
    return (error.strerror or str(error) or type(error).__name__)[:160]
