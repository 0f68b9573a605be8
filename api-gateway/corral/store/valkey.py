"""A client for Valkey (or Redis 7) that pipelines calls over one connection.

Calls made in one turn of the event loop leave in one write. A reply that takes longer than the time-out counts
as the loss of the store: all open calls fail at once, and the connection is made anew with jittered pauses, so
that a stalled store costs a caller one time-out and not one each.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any
from urllib.parse import unquote, urlsplit

import hiredis

TIMEOUT = 0.05
RECONNECT_MIN, RECONNECT_MAX = 0.1, 1.0

Callback = Callable[[Any], None]


class ValkeyDown(Exception):
    """The store cannot be reached or did not answer in time."""


def encode(*parts: bytes) -> bytes:
    """A command in RESP2."""
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


class Valkey:
    """One pipelined connection; ``call`` hands the reply, a ReplyError or ValkeyDown to a callback.

    ``scripts`` are loaded whenever a connection is made; ``connected`` tells whether calls are taken now.
    """

    def __init__(self, url: str, scripts: tuple[str, ...] = (), timeout: float = TIMEOUT) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 6379
        self._user, self._password = parts.username, parts.password
        self._database = parts.path.strip("/") or "0"
        self._scripts = scripts
        self._timeout = timeout
        self._transport: asyncio.Transport | None = None
        self._reader: Any = None
        self._pending: deque[tuple[Callback, float]] = deque()
        self._answered = 0
        self._out: list[bytes] = []
        self._flush_scheduled = False
        self._watch: asyncio.TimerHandle | None = None
        self.connected = False
        self.on_connect: Callable[[], None] = lambda: None
        self.on_message: Callback | None = None

    # -- calls

    def call(self, command: bytes, callback: Callback) -> None:
        """Send an encoded command. `callback` gets ValkeyDown at once where there is no connection."""
        if not self.connected:
            callback(ValkeyDown("no connection to the store"))
            return
        self._out.append(command)
        self._pending.append((callback, monotonic()))
        if not self._flush_scheduled:
            self._schedule()

    def soon(self, callback: Callable[..., None], *args: Any) -> None:
        """Run `callback` in the next turn of the event loop, so that the calls of one turn can be made into one."""
        self._loop.call_soon(callback, *args)

    def _enqueue(self, command: bytes, callback: Callback) -> None:
        self._out.append(command)
        self._pending.append((callback, monotonic()))
        if not self._flush_scheduled:
            self._schedule()

    def _schedule(self) -> None:
        self._flush_scheduled = True
        self._loop.call_soon(self._flush)
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout, self._check)

    async def request(self, *parts: bytes) -> Any:
        """One command, awaited.

        Raises:
            ValkeyDown: no connection, or no reply in time.
            hiredis.ReplyError: the store refused the command.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.call(encode(*parts), _Waiter(future).hand_over)
        reply = await future
        if isinstance(reply, Exception):
            raise reply
        return reply

    def reset(self) -> None:
        """Give the connection up and make it anew, scripts included (they are lost when the store restarts)."""
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._transport is not None and self._out:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def _check(self) -> None:
        self._watch = None
        if not self._pending:
            return
        wait = self._pending[0][1] + self._timeout - monotonic()
        if wait > 0:
            self._watch = self._loop.call_later(wait, self._check)
        else:
            # A loop that was late itself reads its socket first: the reply may be there.
            self._loop.call_soon(self._loop.call_soon, self._expire, self._answered)

    def _expire(self, answered: int) -> None:
        if self._pending and self._answered == answered:
            self._lose()
        elif self._pending and self._watch is None:
            self._watch = self._loop.call_later(self._timeout, self._check)

    # -- the connection

    async def run(self) -> None:
        """Keep a connection until cancelled."""
        self._loop = asyncio.get_running_loop()
        pause = RECONNECT_MIN
        while True:
            lost: asyncio.Event = asyncio.Event()
            try:
                # Not wait_for: in Python 3.11 it may swallow a cancellation that meets its end.
                async with asyncio.timeout(1.0):
                    await self._connect(lost)
                pause = 0.0
                await lost.wait()
            except (OSError, TimeoutError, hiredis.HiredisError):
                pass
            finally:
                self._lose()
            # At once after a loss, with growing pauses while there is nobody.
            if pause:
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(RECONNECT_MAX, max(RECONNECT_MIN, pause * 2))

    async def _connect(self, lost: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        made: Callable[[], Any] = lambda: _Connection(self._received, lost)  # noqa: E731
        transport, _ = await loop.create_connection(made, self._host, self._port)
        self._transport = transport
        commands: list[tuple[bytes, ...]] = []
        if self._password:
            user = (unquote(self._user).encode(),) if self._user else ()
            commands.append((b"AUTH", *user, unquote(self._password).encode()))
        if self._database != "0":
            commands.append((b"SELECT", self._database.encode()))
        commands.append((b"PING",))
        commands += [(b"SCRIPT", b"LOAD", script.encode()) for script in self._scripts]
        for parts in commands:
            future: asyncio.Future[Any] = loop.create_future()
            self._enqueue(encode(*parts), _Waiter(future).hand_over)
            reply = await future
            if isinstance(reply, Exception):
                raise ConnectionError(str(reply))
        self.connected = True
        self.on_connect()

    def _received(self, data: bytes) -> None:
        reader, pending = self._reader, self._pending
        reader.feed(data)
        while (reply := reader.gets()) is not False:
            if pending:
                self._answered += 1
                pending.popleft()[0](reply)
            elif self.on_message is not None:
                self.on_message(reply)  # a channel's message: this connection subscribes and does nothing else
            else:
                self.reset()
                return

    def _lose(self) -> None:
        self.connected = False
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._out.clear()
        pending, self._pending = self._pending, deque()
        for callback, _ in pending:
            with contextlib.suppress(asyncio.InvalidStateError):
                callback(ValkeyDown("the store did not answer in time"))


class _Waiter:
    """Hands a reply to who awaits it, if somebody still does."""

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self._future = future

    def hand_over(self, reply: Any) -> None:
        if not self._future.done():
            self._future.set_result(reply)


class _Connection:
    def __init__(self, received: Callable[[bytes], None], lost: asyncio.Event) -> None:
        self._received = received
        self._lost = lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The caller has the transport."""

    def data_received(self, data: bytes) -> None:
        self._received(data)

    def eof_received(self) -> None:
        """Close."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost.set()

    def pause_writing(self) -> None:
        """A store that takes nothing is given up by the time-out of what waits."""

    def resume_writing(self) -> None:
        """See `pause_writing`."""
