"""A client for Valkey (or Redis 7) that pipelines calls over one connection.

Calls made in one turn of the event loop leave in one write. A reply that takes longer than the time-out counts
as the loss of the store: all open calls fail at once, and the connection is made anew with jittered pauses
(`corral.store.link`), so that a stalled store costs a caller one time-out and not one each.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from corral.store import link

TIMEOUT: Final = 0.05

log = logging.getLogger(__name__)

Callback = Callable[[Any], None]


class ValkeyDown(Exception):
    """The store cannot be reached or did not answer in time."""


def encode(*parts: bytes) -> bytes:
    """A command in RESP2."""
    return b"*%d\r\n%b" % (len(parts), words(*parts))


def words(*parts: bytes) -> bytes:
    """Words of a command in RESP2, without how many it has."""
    out: list[bytes] = []
    for part in parts:
        size = len(part)
        out.append(_SIZES[size] if size < len(_SIZES) else b"$%d\r\n" % size)
        out.append(part)
        out.append(b"\r\n")
    return b"".join(out)


_SIZES: Final = [b"$%d\r\n" % size for size in range(256)]
"""What stands before a word of so many bytes."""


class Valkey:
    """One pipelined connection; ``call`` hands the reply, a ReplyError or ValkeyDown to a callback.

    ``scripts`` are loaded whenever a connection is made, and a key called ``probe`` is written, where one is given: a
    server that refuses that is not used. ``connected`` tells whether calls are taken now,
    ``connections`` counts those that were made, ``lost`` is when the last one was, ``due`` when the next one is tried
    (monotonic seconds). ``server`` is the run id of its server, or b"".
    """

    def __init__(self, url: str, scripts: tuple[str, ...] = (), timeout: float = TIMEOUT, probe: bytes = b"") -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 6379
        self.user, self.password = parts.username, parts.password
        self.database = parts.path.strip("/") or "0"
        self.scripts, self._probe = scripts, probe
        self.loop: asyncio.AbstractEventLoop | None = None
        self.transport: asyncio.Transport | None = None
        self.reader: Any = None
        self._timeout = timeout
        self._pending: deque[Callback] = deque()
        # When each write left, and how many calls had been made by then.
        self._writes: deque[tuple[float, int]] = deque()
        self._called = self._answered = 0
        self._out: list[bytes] = []
        self._watch: asyncio.TimerHandle | None = None
        self.connected = False
        self.connections = 0
        self.lost = float("-inf")
        self.due = 0.0
        self.server = b""
        self.on_connect: Callable[[], None] | None = None
        self.on_message: Callback | None = None

    # -- calls

    def call(self, command: bytes, callback: Callback) -> None:
        """Send an encoded command. `callback` gets ValkeyDown at once where there is no connection."""
        if self.connected:
            self.enqueue(command, callback)
        else:
            callback(ValkeyDown("no connection to the store"))

    def enqueue(self, command: bytes, callback: Callback) -> None:
        """`call` for who makes the connection."""
        out = self._out
        if not out:
            self.soon(self._flush)
        out.append(command)
        self._pending.append(callback)

    def soon(self, callback: Callable[..., None], *args: Any) -> None:
        """Run `callback` in the next turn of the event loop, so that the calls of one turn can be made into one."""
        assert self.loop is not None
        self.loop.call_soon(callback, *args)

    def request(self, *parts: bytes) -> Coroutine[Any, Any, Any]:
        """One command, awaited.

        Raises:
            ValkeyDown: no connection, or no reply in time.
            hiredis.ReplyError: the store refused the command.
        """
        return link.request(self, encode(*parts))

    def run(self) -> Coroutine[Any, Any, None]:
        """Keep a connection until cancelled."""
        return link.run(self)

    def reset(self) -> None:
        """Give the connection up and make it anew, scripts included (they are lost when the store restarts)."""
        if self.transport is not None:
            self.transport.abort()

    def _flush(self) -> None:
        out = self._out
        if not out:
            return
        data = out[0] if len(out) == 1 else b"".join(out)
        self._called += len(out)
        out.clear()
        if self.transport is not None:
            self._writes.append((monotonic(), self._called))
            self.transport.write(data)
            if self._watch is None:
                self._watch_for(self._timeout)

    def _watch_for(self, seconds: float) -> None:
        assert self.loop is not None
        self._watch = self.loop.call_later(seconds, self._check)

    def _check(self) -> None:
        self._watch = None
        writes = self._writes
        while writes and writes[0][1] <= self._answered:
            writes.popleft()
        if not writes:
            return
        wait = writes[0][0] + self._timeout - monotonic()
        if wait > 0:
            self._watch_for(wait)
        else:
            # A loop that was late itself reads its socket first: the reply may be there.
            self.soon(self.soon, self._expire, self._answered)

    def _expire(self, answered: int) -> None:
        if self._pending and self._answered == answered:
            self.lose()
        elif self._writes and self._watch is None:
            self._watch_for(self._timeout)

    # -- the connection

    def protocol(self, lost: asyncio.Event) -> Connection:
        """What a connection is made with; `lost` is set when that has ended."""
        return Connection(self, lost)

    def greeting(self) -> list[bytes]:
        """The commands that come before any call."""
        commands: list[tuple[bytes, ...]] = []
        if self.password:
            user = (unquote(self.user).encode(),) if self.user else ()
            commands.append((b"AUTH", *user, unquote(self.password).encode()))
        if self.database != "0":
            commands.append((b"SELECT", self.database.encode()))
        commands.append((b"PING",))
        if self._probe:
            # A replica, a server that is full or whose disk is, takes scripts to load, and refuses each call of them.
            commands.append((b"SET", self._probe, b"1", b"PX", b"1000"))
        commands += [(b"SCRIPT", b"LOAD", script.encode()) for script in self.scripts]
        return [encode(*parts) for parts in commands]

    def inquiry(self) -> bytes:
        """The command that asks for the server's run id."""
        return encode(b"INFO", b"server")

    def received(self, data: bytes) -> None:
        """Hand each reply to who waits for it."""
        reader, pending = self.reader, self._pending
        reader.feed(data)
        while (reply := reader.gets()) is not False:
            if pending:
                self._answered += 1
                _hand_over(pending.popleft(), reply)
            elif self.on_message is not None:
                _hand_over(self.on_message, reply)  # a channel's: this connection subscribes and does nothing else
            else:
                self.reset()
                return

    def lose(self) -> None:
        """Drop the connection, if there is one; what waits for a reply hears that there will be none."""
        if self.connected:
            self.lost = monotonic()
        self.connected = False
        transport, self.transport = self.transport, None
        if transport is not None:
            transport.abort()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._out.clear()
        self._writes.clear()
        self._called = self._answered = 0
        pending, self._pending = self._pending, deque()
        for callback in pending:
            _hand_over(callback, ValkeyDown("the store did not answer in time"))


def _hand_over(callback: Callback, reply: Any) -> None:
    try:
        callback(reply)
    except Exception:  # one request's fault is not the end of the others that wait for the store
        log.exception("an answer of the store was not taken")


class Connection:
    """The protocol of one connection. ``lost`` is set when it has ended."""

    def __init__(self, store: Valkey, lost: asyncio.Event) -> None:
        self._store = store
        self.lost = lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The caller has the transport."""

    def data_received(self, data: bytes) -> None:
        self._store.received(data)

    def eof_received(self) -> None:
        """Close."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()

    def pause_writing(self) -> None:
        """A store that takes nothing is given up by the time-out of what waits."""

    def resume_writing(self) -> None:
        """See `pause_writing`."""
