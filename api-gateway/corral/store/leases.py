"""What a gateway and the store tell each other beside requests: presence, leases, use, and all that a store lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from time import monotonic, time, time_ns

import hiredis

from corral.store import slots
from corral.store.budget import (
    ACTIVE,
    ADMIT,
    ADMIT_SLOT,
    CHARGE,
    DECLARE,
    EPOCH,
    GRANTS,
    LEASE,
    PREFIX,
    RESERVE,
    RESERVE_SLOT,
    SETTLE,
    USE,
    Budget,
    script,
    sha,
)
from corral.store.keeper import TELL as REBUILD
from corral.store.limits import Limits
from corral.store.valkey import Valkey, ValkeyDown, encode

RENEW = 2.0
ASK = 0.02
PATIENCE, PATIENCE_AGAIN = 2.5, 0.5
"""How long a rebuild waits for gateways that tell nothing (seconds); an idle one sees what happened after `RENEW`."""
AGAIN = 0.5
"""Seconds until a server that refuses what it is told is left."""
AT_ONCE = 200
ACTIVE_MAX = 2000

ROUND = EPOCH + b"-round"
"""Names a store that is told what it last said; it becomes the epoch."""
GATEWAYS = PREFIX + b"gateways"
RENEWAL, FORGET, PRESENT = (script(name, metered=False) for name in ("renew", "forget", "present"))
SCRIPTS = (ADMIT, ADMIT_SLOT, CHARGE, RESERVE, RESERVE_SLOT, SETTLE, DECLARE, USE, RENEWAL, REBUILD, FORGET, PRESENT)
_RENEWAL, _REBUILD, _FORGET, _PRESENT = sha(RENEWAL), sha(REBUILD), sha(FORGET), sha(PRESENT)
_DECLARE, _USE = sha(DECLARE), sha(USE)
_LEASE = b"%d" % (LEASE * 1e6)

log = logging.getLogger(__name__)


class _Forgotten(Exception):
    """The store was flushed since it was asked for its epoch: it is told, and nothing that it says is believed."""


class _Known:
    """``epoch`` is that of the store that knows what this gateway knows, ``server`` the run id of its process.

    ``since`` is how far its use was read (us), ``held`` are the scopes of which others had requests under way then.
    """

    epoch: bytes | None = None
    server: bytes | None = None
    since = 0

    def __init__(self) -> None:
        self.held: list[str] = []


async def keep(limits: Limits) -> None:
    """Renew leases and presence each two seconds, until cancelled.

    A store that came back hears at once of what ended meanwhile, before it admits anything, and of what runs; one that
    has forgotten hears what it last said.
    """
    store = limits.store
    wake = asyncio.Event()
    known = _Known()

    def came_back() -> None:
        if store is not None and _moved(store, known):
            _another_server(store, known)
            limits.on_moved()
        limits.give_back()
        wake.set()
        if limits.slots is not None:
            limits.slots.connected()

    if store is not None:
        store.on_connect = came_back
        if store.connected:
            wake.set()  # it was there before this was
    limits.on_lost = wake.set
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RENEW):
                await wake.wait()
        told = wake.is_set()
        wake.clear()
        if store is None or not store.connected:
            continue
        if not told:
            limits.give_back()
        try:
            await _same_store(limits, store, known)
            await _present(limits, store, known)
            await _renew(limits, store)
            await _read_use(limits, store, known)
            limits.back()
        except _Forgotten:
            wake.set()
        except (OSError, ValkeyDown, hiredis.ReplyError) as error:
            log.warning("leases were not renewed: %s", error)
            if isinstance(error, hiredis.ReplyError):
                if told:  # right after it was connected
                    await asyncio.sleep(AGAIN)
                store.reset()  # a replica now, say: the address may lead to another server by now
        except Exception:  # a fault of ours, or a store of another kind: requests go on
            log.exception("leases were not renewed")


async def tell(limits: Limits, scopes: list[Budget]) -> None:
    """Tell a store that grants what is known of these; it takes the larger number.

    Raises:
        ValkeyDown: it went away meanwhile.
    """
    store = limits.store
    if store is not None and await store.request(b"EXISTS", GRANTS):
        await _declare_some(store, scopes, monotonic())


def _moved(store: Valkey, known: _Known) -> bool:
    """Whether another server is where the store was."""
    return known.server not in (None, store.server)


def _another_server(store: Valkey, known: _Known) -> None:
    """Have what took the store's place, with its data or a part of them, be told anew.

    A replica that was promoted may lack what was acknowledged last, and has the epoch all the same. It is the first
    thing that is said on a connection: nothing is granted, counted or believed by what such a server holds.
    """
    server = store.server

    def heard(reply: object) -> None:
        if not isinstance(reply, Exception):
            known.server = server

    keys = (EPOCH, GRANTS, ROUND, slots.GRANTS, slots.EPOCH)
    store.call(encode(b"EVALSHA", _FORGET, b"5", *keys, known.epoch or b""), heard)


async def _same_store(limits: Limits, store: Valkey, known: _Known) -> None:
    """See that the store knows what it last said, whatever became of it, or becomes of it meanwhile."""
    if _moved(store, known):
        _another_server(store, known)  # it refused that, as a replica does that is not promoted yet
    told, rebuilt = known.epoch, False
    while True:
        epoch, grants = await store.request(b"MGET", EPOCH, GRANTS)
        if epoch is None:
            told = await _first_step(limits, store)
        elif told not in (None, epoch):
            await _tell_all(limits, store)  # others have told it without this one
            told = epoch
        elif grants is not None:
            break
        else:
            limits.give_back()
            await store.request(b"PING")  # answered after all that was told
            await _step(limits, store, GRANTS, PATIENCE_AGAIN, EPOCH, epoch)
        rebuilt = True
    if rebuilt:
        limits.give_back()  # what was admitted meanwhile
        log.info("the store had forgotten what it knew, and was told")
    known.epoch = epoch
    if known.server is None:
        known.server = store.server


async def _first_step(limits: Limits, store: Valkey) -> bytes:
    """Tell a store without an epoch what it last said; the epoch that it gets by that, if it is not flushed again."""
    await store.request(b"SET", ROUND, b"%d" % time_ns(), b"NX")
    name: bytes = await store.request(b"GET", ROUND) or b""
    await _tell_all(limits, store)
    await _step(limits, store, EPOCH, PATIENCE, ROUND, name)
    return name


async def _tell_all(limits: Limits, store: Valkey) -> None:
    # Presence first: when the last one has told, all are counted.
    await store.request(b"ZADD", GATEWAYS, b"%f" % await _clock(store), limits.gateway)
    await _declare(limits, store)


async def _step(limits: Limits, store: Valkey, key: bytes, patience: float, named: bytes, name: bytes) -> None:
    """End a step of a rebuild, for a store that `named` says is the one that was told; at once where it is not."""
    keys = (key, key + b"-told", key + b"-of", named)
    numbers = (b"%d" % limits.sharing.count, b"%d" % (patience * 1e6), name, b"1" if named == ROUND else b"0")
    while not await store.request(b"EVALSHA", _REBUILD, b"4", *keys, limits.gateway, *numbers):  # noqa: ASYNC110
        await asyncio.sleep(ASK)  # others have yet to tell


async def _declare(limits: Limits, store: Valkey) -> None:
    now, wall = monotonic(), time()
    told: dict[str, Budget] = {}
    for budget in limits.budgets():
        for scope in budget.scopes:
            scope.roll(wall)
            if scope.in_flight or scope.said_arrival > now or scope.window or scope.day_used or scope.month_used:
                told[scope.key_id] = scope
    await _declare_some(store, list(told.values()), now)


async def _declare_some(store: Valkey, scopes: list[Budget], now: float) -> None:
    for first in range(0, len(scopes), AT_ONCE):
        await asyncio.gather(*(_declare_one(store, scope, now) for scope in scopes[first : first + AT_ONCE]))


async def _declare_one(store: Valkey, scope: Budget, now: float) -> None:
    window = scope.window if scope.tokens_arrival > now else 0
    numbers = [
        max(0, int((scope.said_arrival - now) * 1e6)),
        scope.daily_tokens or 0,
        scope.monthly_tokens or 0,
        window,
    ]
    numbers += [scope.day, scope.day_used, scope.month, scope.month_used, int(LEASE * 1e6)]
    running = [name.encode() for name in scope.in_flight] if scope.concurrency else []
    keys = (ACTIVE, scope.rate, scope.tokens, scope.leases)
    arguments = (b"%d" % number for number in numbers)
    await store.request(b"EVALSHA", _DECLARE, b"4", *keys, scope.key_id.encode(), *arguments, *running)


async def _present(limits: Limits, store: Valkey, known: _Known) -> None:
    arguments = (known.epoch or b"", limits.gateway, b"%d" % LEASE)
    names = await store.request(b"EVALSHA", _PRESENT, b"2", EPOCH, GATEWAYS, *arguments)
    if names is None:
        raise _Forgotten
    limits.sharing.said([name.decode() for name in names])


async def _clock(store: Valkey) -> float:
    seconds, micros = await store.request(b"TIME")
    return int(seconds) + int(micros) / 1e6


async def _renew(limits: Limits, store: Valkey) -> None:
    for budget in list(limits.busy.values()):
        if budget.concurrency and budget.in_flight:
            running = [identity.encode() for identity in budget.in_flight]
            keys, name = (budget.leases, ACTIVE), budget.key_id.encode()
            await store.request(b"EVALSHA", _RENEWAL, b"2", *keys, _LEASE, name, *running)


async def _read_use(limits: Limits, store: Valkey, known: _Known) -> None:
    """Read what others used lately, so that the share of a gateway that never saw a key is the right one."""
    latest = int(await _clock(store) * 1e6)
    # A second of overlap: what is written while this is read is read next time.
    since = b"%d" % max(0, known.since - 1_000_000)
    await store.request(b"ZREMRANGEBYSCORE", ACTIVE, b"-inf", b"(%d" % (latest - 60_000_000))
    names = await store.request(b"ZREVRANGEBYSCORE", ACTIVE, b"+inf", since, b"LIMIT", b"0", b"%d" % ACTIVE_MAX)
    # Nobody says that a request ended, or that its gateway did.
    told = list(limits.sharing.told)[:ACTIVE_MAX]
    limits.sharing.told.difference_update(told)
    wanted = dict.fromkeys([*(name.decode() for name in names), *known.held, *told])
    scopes = [scope for name in wanted if (scope := limits.find(name)) is not None]
    known.held = []
    for first in range(0, len(scopes), AT_ONCE):
        some = scopes[first : first + AT_ONCE]
        now = monotonic()
        # What is admitted while this is read is taken for others': rather too few than too many without the store.
        own = [len(scope.in_flight) for scope in some]
        keys = [EPOCH, *(key for scope in some for key in (scope.tokens, scope.rate, scope.leases))]
        answer = await store.request(b"EVALSHA", _USE, b"%d" % len(keys), *keys, known.epoch or b"")
        if answer is None:
            raise _Forgotten
        day, month, *use = answer
        for place, scope in enumerate(some):
            window, of_day, of_month, whole, leases = use[place * 5 : place * 5 + 5]
            scope.said(now, window, day, of_day, month, of_month)
            scope.used_by_all(now, whole / 1e6, leases, own[place])
            if scope.others:
                known.held.append(scope.key_id)
    known.since = latest
