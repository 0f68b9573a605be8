"""Renews the leases of what runs, and a gateway's presence among those that share the limits."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from importlib.resources import files

import hiredis

from corral.store.limits import LEASE, PREFIX, Limits
from corral.store.valkey import Valkey, ValkeyDown

RENEW = 2.0

SCRIPT = (files("corral.store") / "scripts" / "renew.lua").read_text()
_SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest().encode()

log = logging.getLogger(__name__)


async def keep(limits: Limits) -> None:
    """Renew leases and presence each two seconds, until cancelled.

    A store that came back hears at once of what ended meanwhile, before it admits anything, and of what runs: it may
    have forgotten.
    """
    store = limits.store
    back = asyncio.Event()

    def came_back() -> None:
        limits.give_back()
        back.set()

    if store is not None:
        store.on_connect = came_back
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RENEW):
                await back.wait()
        told = back.is_set()
        back.clear()
        if store is None or not store.connected:
            continue
        if not told:
            limits.give_back()
        try:
            await _present(limits, store)
            for budget in list(limits.busy.values()):
                if budget.concurrency and budget.in_flight:
                    await store.request(
                        b"EVALSHA",
                        _SHA,
                        b"1",
                        budget.leases,
                        b"%d" % (LEASE * 1e6),
                        *(identity.encode() for identity in budget.in_flight),
                    )
        except (OSError, ValkeyDown, hiredis.ReplyError) as error:
            log.warning("leases were not renewed: %s", error)


async def _present(limits: Limits, store: Valkey) -> None:
    seconds, micros = await store.request(b"TIME")
    now = int(seconds) + int(micros) / 1e6
    gateways = PREFIX + b"gateways"
    await store.request(b"ZADD", gateways, b"%f" % now, limits.gateway)
    await store.request(b"ZREMRANGEBYSCORE", gateways, b"-inf", b"%f" % (now - LEASE))
    limits.gateways = max(1, int(await store.request(b"ZCARD", gateways)))
