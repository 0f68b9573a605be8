"""What waits, of the client for Valkey: making its connection, keeping it, and a call that is awaited."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import hiredis

if TYPE_CHECKING:
    from corral.store.valkey import Valkey

CONNECT = 1.0
RECONNECT_MIN, RECONNECT_MAX = 0.1, 1.0

log = logging.getLogger(__name__)


class Refused(ConnectionError):
    """The server is there, and takes nothing from this client; in its own words."""


async def request(store: Valkey, command: bytes) -> Any:
    """`Valkey.request`."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    store.call(command, _Waiter(future).hand_over)
    reply = await future
    if isinstance(reply, Exception):
        raise reply
    return reply


async def run(store: Valkey) -> None:
    """`Valkey.run`."""
    store.loop = asyncio.get_running_loop()
    pause = RECONNECT_MIN
    said = ""
    while True:
        lost: asyncio.Event = asyncio.Event()
        try:
            # Not wait_for: in Python 3.11 it may swallow a cancellation that meets its end.
            async with asyncio.timeout(CONNECT):
                await _connect(store, lost)
            pause, said = 0.0, ""
            await lost.wait()
        except Refused as error:
            # Once, however often it is tried; one that reads its file has only begun.
            if str(error) != said and not str(error).startswith("LOADING"):
                said = str(error)
                log.error("the store at %s:%d is not used: it says %s", store.host, store.port, said)
        except (OSError, TimeoutError, hiredis.HiredisError):
            pass
        finally:
            store.lose()
        # At once after a loss, with growing pauses while there is nobody.
        if pause:
            wait = pause * random.uniform(0.5, 1.0)
            store.due = monotonic() + wait
            await asyncio.sleep(wait)
        pause = min(RECONNECT_MAX, max(RECONNECT_MIN, pause * 2))


async def _connect(store: Valkey, lost: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    store.reader = hiredis.Reader()
    made: Callable[[], Any] = lambda: store.protocol(lost)  # noqa: E731
    store.transport, _ = await loop.create_connection(made, store.host, store.port)

    async def ask(command: bytes) -> Any:
        future: asyncio.Future[Any] = loop.create_future()
        store.enqueue(command, _Waiter(future).hand_over)
        return await future

    for command in store.greeting():
        reply = await ask(command)
        if isinstance(reply, hiredis.ReplyError):
            raise Refused(str(reply))
        if isinstance(reply, Exception):
            raise ConnectionError(str(reply))
    # A user that may not ask has no run id, which is no reason not to be served.
    told = await ask(store.inquiry())
    if isinstance(told, Exception) and not isinstance(told, hiredis.ReplyError):
        raise ConnectionError(str(told))
    found = re.search(rb"\brun_id:(\w+)", told) if isinstance(told, bytes) else None
    store.server = found[1] if found else b""
    store.connected = True
    store.connections += 1
    if store.on_connect is not None:
        store.on_connect()


class _Waiter:
    """Hands a reply to who awaits it, if somebody still does."""

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self._future = future

    def hand_over(self, reply: Any) -> None:
        if not self._future.done():
            self._future.set_result(reply)
