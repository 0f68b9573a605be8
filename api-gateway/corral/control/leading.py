"""Who leads among control processes, and what the leader does: it says what stands where, each half second or sooner.

The lease is a row of the database (`corral.store.lease`); its term is in the store too, so that a leader that was
deposed and could not hear of it finds a greater one there and stops; if it still has the lease, as in a database that
was restored from a backup, it goes on in a greater term. Without the database a leader goes on until then:
nobody can take the lease from it. Gateways see by the store's key whether there is a leader: it is renewed beside the
looks at the fleet, so that a long one does not let it lapse, but not for one that hangs, nor is the lease.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

import hiredis
from sqlalchemy.exc import SQLAlchemyError

from corral.control.placement import Placement
from corral.control.prober import Fleet
from corral.store import lease
from corral.store.database import Database
from corral.store.keeper import LEADER, TERM
from corral.store.slots import QUIET
from corral.store.valkey import Valkey, ValkeyDown

TICK = 0.5
QUICK = 0.1
"""The pause between two looks while somebody waits for what they change (seconds)."""
LEISURE = 4.0
"""Such a pause is so many times as long as the look itself: in a large fleet no more of a core goes into it."""
RENEW = 2.0
LEASE = 8.0
KEY_MS = int(QUIET * 1000)
"""For so long gateways believe in a leader that says nothing."""
HUNG = 15.0
"""A look at the fleet that lasts longer (seconds) is thought to hang: gateways stand in while who came when it began
still waits (`queue.wait`)."""

AWAY = (SQLAlchemyError, OSError, TimeoutError)

log = logging.getLogger(__name__)


def pause(hurries: bool, took: float) -> float:
    """How long to wait after a look at the fleet that took so long (seconds)."""
    return min(TICK, max(QUICK, LEISURE * took)) if hurries else TICK


class Leading:
    """Keeps the lease and runs placement under it. ``leads``: this process is the leader now. ``wanted``: placement is
    not turned off.

    ``make`` makes a placement for a term. Its reasons are asked of ``placement``, which is None before the first term.
    """

    def __init__(self, database: Database, store: Valkey, fleet: Fleet, make: Callable[[int], Placement]) -> None:
        self._database, self._store, self._fleet, self._make = database, store, fleet, make
        self._holder = secrets.token_hex(8)
        self._deposed = 0
        self._silent = False
        self._began: float | None = None
        self._looked = 0
        self._until: float | None = None
        self._seen = time.monotonic()
        self.wanted = True
        self.leads = False
        self.term = 0
        self.placement: Placement | None = None
        self._least = 1

    @property
    def missing(self) -> bool:
        """Whether somebody is to say what stands where, and it is not this one."""
        return self.wanted and not self.leads

    @property
    def _hangs(self) -> bool:
        return self._began is not None and asyncio.get_running_loop().time() - self._began >= HUNG

    async def run(self) -> None:
        """Until cancelled; then another may lead at once."""
        beside: list[asyncio.Task[None]] = []
        try:
            beside = [asyncio.create_task(self._renew()), asyncio.create_task(self._keep_said())]
            loop = asyncio.get_running_loop()
            while True:
                began = loop.time()
                await self._turn()
                hurries = self.leads and self.placement is not None and self.placement.hurries
                await asyncio.sleep(pause(hurries, loop.time() - began))
        finally:
            for task in beside:
                task.cancel()
            await self._close()

    async def _turn(self) -> None:
        try:
            now = asyncio.get_running_loop().time()
            if self.leads and self._store.connected:
                self._began = now
                await self._lead(now)
                self._silent = False
        except (ValkeyDown, hiredis.HiredisError, OSError) as error:
            if not self._silent:
                log.warning("what stands where is not decided: %s", error)
            self._silent = True
            if isinstance(error, hiredis.ReplyError):
                self._store.reset()  # a replica now, say: its address may lead to another server by now
        except Exception:  # a fault of ours: gateways go on by themselves, and the next turn may be better
            log.exception("what stands where was not decided")
        finally:
            self._began = None

    async def _keep_said(self) -> None:
        # Beside the turns: gateways believe in a leader whose look takes long, once its first has ended.
        while True:
            try:
                looked = self.leads and self._looked == self.term and not self._hangs
                if looked and self._store.connected and await self._undeposed():
                    await self._say()
            except (ValkeyDown, hiredis.HiredisError, OSError) as error:
                log.debug("that there is a leader is not said: %s", error)  # the turn says more
            await asyncio.sleep(TICK)

    async def _renew(self) -> None:
        # Beside the turns: a database that hangs must not hold them up.
        while True:
            try:
                if self._hangs:
                    await self._stop("its look at the fleet does not end")
                else:
                    await self._take()
            except AWAY as error:
                log.warning("the leader's lease is not renewed: %s", error)
            await asyncio.sleep(RENEW)

    async def _take(self) -> None:
        term = await self._database.write(lease.take, self._holder, time.time(), LEASE, self._unrenewed())
        if term is None:
            self._watch(await self._database.read(lease.until))
        await self._heard(term)

    def _watch(self, until: float | None) -> None:
        # Another's clock may be anywhere, and be set: what counts is that it goes on renewing.
        if until != self._until:
            self._until, self._seen = until, time.monotonic()

    def _unrenewed(self) -> float | None:
        return self._until if time.monotonic() - self._seen >= LEASE else None

    async def _heard(self, term: int | None) -> None:
        if term is None or term <= self._deposed:
            await self._stop("another control leads")
            if term is not None and term < self._least:
                await self._database.write(lease.raise_to, self._holder, self._least)
        elif not self.leads or term != self.term:
            await self._stop("")
            log.info("this control leads, in term %d", term)
            self.leads, self.term, self.placement = True, term, self._make(term)

    async def _lead(self, now: float) -> None:
        placement = self.placement
        assert placement is not None
        if not await self._undeposed():
            return
        await placement.tick(self._fleet.members.values(), now)
        if self.leads and self.placement is placement:
            self._looked = self.term
            await self._say()

    async def _undeposed(self) -> bool:
        """Whether this control leads as far as the store knows; the store hears of its term."""
        said = int(await self._store.request(b"GET", TERM) or 0)
        if not self.leads:
            return False
        if said > self.term:
            self._deposed, self._least = self.term, said + 1
            await self._stop(f"another control leads, or led, in term {said}")
            return False
        if said < self.term:
            await self._store.request(b"SET", TERM, b"%d" % self.term)
        return self.leads

    async def _say(self) -> None:
        await self._store.request(b"SET", LEADER, b"%d" % self.term, b"PX", b"%d" % KEY_MS)

    async def _stop(self, why: str) -> None:
        if self.leads and why:
            log.warning("this control leads no more: %s", why)
        self.leads, self._looked = False, 0
        if self.placement is not None:
            await self.placement.close()

    async def _close(self) -> None:
        led = self.leads
        await self._stop("")
        if not led:
            return
        try:
            await asyncio.shield(self._database.write(lease.give_up, self._holder))
            if self._store.connected and int(await self._store.request(b"GET", LEADER) or 0) == self.term:
                await self._store.request(b"DEL", LEADER)
        except (*AWAY, ValkeyDown, hiredis.HiredisError) as error:
            log.warning("the leader's lease runs out by itself: %s", error)
