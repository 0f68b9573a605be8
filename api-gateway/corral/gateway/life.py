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

from corral.gateway import crashing
from corral.gateway.listen import ClientConnection
from corral.gateway.server import Gateway
from corral.store import keeper, leases
from corral.store.valkey import encode
from corral.wire.errors import ApiError

SWEEP = 0.5
DRAIN = 25.0
LAST = 1.0
CUT = f"this gateway is being stopped, and has waited {DRAIN:g} s for the answer to end"
LOOK = 0.05
CHANNEL = b"corral:snapshot"

log = logging.getLogger(__name__)


async def serve(gateway: Gateway, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, then drain: have nobody sent here, end what runs, ship the spool."""
    loop = gateway.loop
    gateway.feed.load()
    await gateway.exposition.start()
    gateway.changes.on_message = gateway.changed
    gateway.changes.on_connect = lambda: gateway.changes.call(
        encode(b"SUBSCRIBE", CHANNEL, crashing.CHANNEL, gateway.queue.slots.channel), lambda reply: None
    )
    tasks = [
        loop.create_task(work, name=name)
        for name, work in (
            ("store", gateway.store.run()),
            ("changes", gateway.changes.run()),
            ("feed", gateway.feed.run()),
            ("shipper", gateway.shipper.run()),
            ("adopter", gateway.adopter.run()),
            ("sweep", _sweep(gateway)),
        )
    ]
    # What was used before this process comes first: then the store can be told of it, and callers be let in.
    await gateway.recall.first()
    tasks.append(loop.create_task(leases.keep(gateway.limits), name="leases"))
    tasks.append(loop.create_task(keeper.keep(gateway.queue.slots), name="slots"))
    recalling = loop.create_task(gateway.recall.again())
    accept: Callable[[], Any] = lambda: ClientConnection(gateway)  # noqa: E731
    server = await loop.create_server(accept, host, port, backlog=4096)
    log.info("%s listens on %s:%d", gateway.name, host, port)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    ended: asyncio.Future[Any] = asyncio.gather(*tasks)
    waiting: asyncio.Future[Any] = loop.create_task(stop.wait())
    await asyncio.wait({ended, waiting}, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task.done():
            why = "cancelled" if task.cancelled() else repr(task.exception())
            log.critical("%s drains and ends, as a part of it has ended: %s: %s", gateway.name, task.get_name(), why)
    gateway.stopping = True
    waiting.cancel()
    try:
        await _leave(gateway)
        server.close()
        await _drain(gateway)
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


async def _leave(gateway: Gateway) -> None:
    checks, now = gateway.checks, time.monotonic()
    checks.leave(now)
    while not checks.heard(now):
        await asyncio.sleep(LOOK)
        now = time.monotonic()
    await asyncio.sleep(LOOK)  # who has just heard it acts on it


async def _drain(gateway: Gateway) -> None:
    for connection in list(gateway.connections):
        if connection.idle and connection.transport is not None:
            connection.transport.close()
    gateway.idle.clear()
    await _until_idle(gateway, DRAIN)
    for exchange in list(gateway.running):
        try:
            exchange.abandon()
            exchange.give_up(ApiError(503, "unavailable", CUT, retry_after=1), "interrupted")
        except Exception:
            log.exception("a request was not ended in order")
    await _until_idle(gateway, LAST)
    for connection in list(gateway.connections):
        if connection.transport is not None:
            connection.transport.abort()
    await asyncio.sleep(0)


async def _until_idle(gateway: Gateway, within: float) -> None:
    if gateway.connections:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await gateway.idle.wait()


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
