"""A gateway's life from start to drain.

Here and in the modules beside it that have coroutines nothing is compiled: what waits gains nothing from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable
from typing import Any

from corral.gateway.listen import ClientConnection
from corral.gateway.server import Gateway
from corral.store import keeper, leases, reading, share, suspects
from corral.store.valkey import encode
from corral.wire.errors import ApiError, jittered

SWEEP = 0.5
HASTE = 25.0
"""Seconds that answers which have begun are given where all of the stack stops."""
LAST = 1.0
CUT = "this gateway is being stopped, and has waited {:.0f} s for the answer to end"
LOOK = 0.05
CHANNEL = b"corral:snapshot"

log = logging.getLogger(__name__)


class Stop:
    """Whether this gateway is to stop, and how long the answers that have begun may still take, as signals say.

    SIGTERM: as long as ``drain`` (seconds). SIGINT: 25 s at most, also while it drains already. Any further one: they
    end now.
    """

    def __init__(self, drain: float) -> None:
        self.asked = asyncio.Event()
        self._within = drain
        self._hurried = False
        self._limit: asyncio.Timeout | None = None

    def signal(self, number: int) -> None:
        """A signal has come."""
        if number == signal.SIGINT and not self._hurried:
            self.hurry()
        elif self.asked.is_set():
            self._shorten(0.0)
        self.asked.set()

    def hurry(self) -> None:
        """Wait no longer than where all of the stack stops."""
        self._hurried = True
        self._shorten(HASTE)

    async def wait(self, idle: asyncio.Event) -> None:
        """Wait until ``idle``, or until the answers have had their time; it begins here."""
        with contextlib.suppress(TimeoutError):
            try:
                async with asyncio.timeout(self._within) as self._limit:
                    await idle.wait()
            finally:
                self._limit = None

    def _shorten(self, seconds: float) -> None:
        self._within = min(self._within, seconds)
        if self._limit is not None and not self._limit.expired():
            until, latest = self._limit.when(), asyncio.get_running_loop().time() + seconds
            self._limit.reschedule(latest if until is None else min(until, latest))


async def serve(gateway: Gateway, host: str, port: int, drain: float) -> None:
    """Serve until SIGTERM or SIGINT, then drain: have nobody sent here, end what runs, ship the spool.

    ``drain``: how long answers that have begun may take (seconds), once told to end by SIGTERM.
    """
    loop = gateway.loop
    gateway.feed.load()
    await gateway.exposition.start()
    gateway.changes.on_message = gateway.changed
    gateway.changes.on_connect = lambda: _listen(gateway)
    tasks = [
        loop.create_task(work, name=name)
        for name, work in (
            ("store", gateway.store.run()),
            ("changes", gateway.changes.run()),
            ("feed", gateway.feed.run()),
            ("probe", gateway.probe.run()),
            ("shipper", gateway.shipper.run()),
            ("adopter", gateway.adopter.run()),
            ("sweep", _sweep(gateway)),
        )
    ]
    # What was used before this process comes first: then the store can be told of it, and callers be let in.
    await gateway.recall.first()
    tasks.append(loop.create_task(leases.keep(gateway.limits), name="leases"))
    tasks.append(loop.create_task(keeper.keep(gateway.queue.slots), name="slots"))
    telling = reading.keep(gateway.health.reading, gateway.store, gateway.name)
    tasks.append(loop.create_task(telling, name="reading"))
    recalling = loop.create_task(gateway.recall.again())
    accept: Callable[[], Any] = lambda: ClientConnection(gateway)  # noqa: E731
    server = await loop.create_server(accept, host, port, backlog=4096)
    gateway.listening = True
    log.info("%s listens on %s:%d", gateway.name, host, port)
    stop = Stop(drain)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.signal, number)
    ended: asyncio.Future[Any] = asyncio.gather(*tasks)
    waiting: asyncio.Future[Any] = loop.create_task(stop.asked.wait())
    await asyncio.wait({ended, waiting}, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task.done():
            why = "cancelled" if task.cancelled() else repr(task.exception())
            log.critical("%s drains and ends, as a part of it has ended: %s: %s", gateway.name, task.get_name(), why)
            stop.hurry()
    gateway.stopping = True
    gateway.feed.poke()
    waiting.cancel()
    try:
        await _leave(gateway)
        server.close()
        await _drain(gateway, stop)
        for id in list(gateway.cooling):
            gateway.cooled(id)
        await keeper.leave(gateway.queue.slots)
    finally:
        for task in (*tasks, recalling):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ended
        gateway.journal.close()
        gateway.upstreams.close()
        await gateway.shipper.drain()
        await gateway.feed.leave()
        await gateway.exposition.close()


def _listen(gateway: Gateway) -> None:
    """Hear what others tell, and ask for what was told while nobody listened here: a key may have been revoked."""

    def heard(reply: Any) -> None:
        gateway.suspects.missed()
        gateway.feed.poke()

    channels = CHANNEL, suspects.CHANNEL, share.CHANNEL, gateway.queue.slots.channel
    gateway.changes.call(encode(b"SUBSCRIBE", *channels), heard)


async def _leave(gateway: Gateway) -> None:
    checks, now = gateway.checks, time.monotonic()
    checks.leave(now)
    while not checks.heard(now):
        await asyncio.sleep(LOOK)
        now = time.monotonic()
    await asyncio.sleep(LOOK)  # who has just heard it acts on it


async def _drain(gateway: Gateway, stop: Stop) -> None:
    busy = 0
    for connection in list(gateway.connections):
        if not connection.idle:
            busy += 1
        elif connection.transport is not None:
            connection.transport.close()
    gateway.idle.clear()
    began = time.monotonic()
    if busy:
        log.info("%s drains: connections that have an answer to come: %d", gateway.name, busy)
    if gateway.connections:
        await stop.wait(gateway.idle)
    for exchange in list(gateway.running):
        try:
            exchange.abandon()
            cut = ApiError(503, "unavailable", CUT.format(time.monotonic() - began), retry_after=jittered(LAST))
            exchange.give_up(cut, "interrupted")
        except Exception:
            log.exception("a request was not ended in order")
    if gateway.connections:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST):
                await gateway.idle.wait()
    for connection in list(gateway.connections):
        if connection.transport is not None:
            connection.transport.abort()
    await asyncio.sleep(0)


async def _sweep(gateway: Gateway) -> None:
    latest, halted = time.monotonic(), False
    while True:
        await asyncio.sleep(SWEEP)
        now = time.monotonic()
        # Where it was this process that stood still, what came meanwhile is read before anybody is called late. Not
        # twice in a row: one that is always behind must end things too.
        halted = now - latest > 2 * SWEEP and not halted
        latest = now
        if halted:
            continue
        try:
            gateway.sweep(now)
        except Exception:  # one request's fault is not the end of all
            log.exception("deadlines were not looked at")
