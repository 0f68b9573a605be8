"""What a gateway and the store tell each other of slots beside requests: leases, tickets that have their turn, places.

The counterpart of `corral.store.leases` for slots.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic, time_ns

import hiredis

from corral.store.lua import PREFIX, script, sha, slots_script
from corral.store.slots import ASK, DECLARE, END, EPOCH, GRANTS, LEASE, STAND, Slots, Wanted
from corral.store.valkey import Valkey, ValkeyDown, encode

RENEW = 2.0
POLL = 0.5
PATIENCE_US = 2_000_000
"""How long a store that was flushed waits for gateways that tell nothing before it grants."""
AT_ONCE = 200
ROUNDS = 3
"""How often the store is told what it does not know before it is asked again in the next renewal."""
LEADER = PREFIX + b"leader"
"""There is one while somebody says what stands where."""
TERM = LEADER + b"-term"
"""The greatest term in which somebody did; it stays."""

PLACE, LIVE, LOOK = (slots_script(name) for name in ("slots_place", "slots_live", "slots_look"))
TELL = script("rebuild", metered=False)
"""Ends a step of a rebuild; that of limits (`corral.store.leases`) too."""
SCRIPTS = (ASK, END, DECLARE, STAND, PLACE, LIVE, LOOK, TELL)
_ASK, _PLACE, _LIVE, _LOOK, _DECLARE, _TELL = (sha(text) for text in (ASK, PLACE, LIVE, LOOK, DECLARE, TELL))

log = logging.getLogger(__name__)


class Deposed(Exception):
    """Whoever wants to lead does so no more."""


async def place(store: Valkey, node: str, model: str, state: str, generation: int, slots: int, step: float) -> bool:
    """What the leader says of a place; False where a later word is known.

    Raises:
        ValkeyDown, hiredis.ReplyError: the store did not hear of it.
    """
    numbers = (b"%d" % generation, b"%d" % slots, b"%d" % step)
    names = (node.encode(), model.encode(), state.encode())
    return bool(await store.request(b"EVALSHA", _PLACE, b"0", *names, *numbers))


async def fence(store: Valkey, term: int) -> None:
    """Before a leader acts on a node, which knows nothing of terms: one that stood still may have been followed.

    Raises:
        Deposed: in a later term another leads, or led.
        ValkeyDown, hiredis.ReplyError: the store does not say.
    """
    if (said := int(await store.request(b"GET", TERM) or 0)) > term:
        raise Deposed(f"another control leads, or led, in term {said}")


async def keep(slots: Slots) -> None:
    """Renew each two seconds, and look after tickets and others' leases each half, until cancelled."""
    store = slots.store
    renewed = -slots.lease
    lost = asyncio.Event()
    slots.on_lost = lost.set
    while True:
        # Also without a connection: the wait below would be none, and nothing else ran.
        lost.clear()
        try:
            if store.connected:
                connection = store.connections
                # Also where nothing is asked: others wait for what this one has to tell.
                await _rebuild(slots)
                if slots.told != connection:
                    # What runs comes before anything is taken back, and given to others.
                    await _declare(slots, [wanted for wanted in slots.held.values() if wanted.node])
                leader, over = await store.request(b"EVALSHA", _LOOK, b"0")
                due = monotonic() - renewed >= slots.lease / LEASE * RENEW
                # Also for the slots of one that died: others may have them as soon as its lease is over.
                if over or due or slots.lapsed or slots.told != connection:
                    await renew(slots)
                    renewed = monotonic()
                slots.led = bool(leader)
                slots.was_led = slots.was_led or slots.led
                slots.told, slots.unheard = connection, False
                slots.catch_up()
                await _poll(slots)
        except (OSError, ValkeyDown, hiredis.ReplyError) as error:
            log.warning("slots were not renewed: %s", error)
        except Exception:  # a fault of ours, or a store of another kind: requests go on
            log.exception("slots were not renewed")
        try:
            async with asyncio.timeout(POLL):
                await lost.wait()
        except TimeoutError:
            pass


async def listen(slots: Slots, ears: Valkey) -> None:
    """Hear what is given to tickets, until cancelled; the connection is made anew when it is lost."""

    def subscribe() -> None:
        ears.enqueue(encode(b"SUBSCRIBE", slots.channel), lambda _: None)

    ears.on_message = slots.woken
    ears.on_connect = subscribe
    await ears.run()


async def leave(slots: Slots) -> None:
    """Give back all at once: this gateway ends in order."""
    slots.held.clear()
    try:
        async with asyncio.timeout(1.0):
            await renew(slots)
    except (OSError, TimeoutError, ValkeyDown, hiredis.ReplyError) as error:
        log.warning("slots return with their lease: %s", error)


async def renew(slots: Slots) -> None:
    """Renew the lease, and have the store know just what is held.

    Raises:
        ValkeyDown, hiredis.ReplyError: it did not hear all of it.
    """
    slots.flush()
    for _ in range(ROUNDS):
        arguments = [slots.gateway, b"%d" % (slots.lease * 1e6)]
        for wanted in slots.held.values():
            runs = b"%b %d" % (wanted.node.encode(), wanted.reads) if wanted.node else b""
            arguments += [wanted.id.encode(), runs]
        began = monotonic()
        missing = [id.decode() for id in await slots.store.request(b"EVALSHA", _LIVE, b"0", *arguments)]
        slots.until = began + slots.lease
        if not missing:
            return
        await _declare(slots, [slots.held[id] for id in missing if id in slots.held])


async def _poll(slots: Slots) -> None:
    """Ask again for what has waited longest of each model and kind, and for what avoids other nodes than before; hear
    what was given while nobody heard."""
    ids = list(slots.waiting)
    first: dict[tuple[str, int], Wanted] = {}
    changed: list[Wanted] = []
    for id in ids:
        wanted = slots.held[id]
        if first.setdefault((wanted.model, wanted.kind), wanted) is not wanted and wanted.told != wanted.preferred:
            changed.append(wanted)
    for wanted in (*first.values(), *changed[:AT_ONCE]):
        if wanted.id not in slots.waiting:
            continue
        reply = await slots.store.request(*_question(slots, wanted))
        if type(reply) is list and reply[0] == 1:
            slots.given(wanted.id, reply[1].decode(), reply[2])
    for at in range(0, len(ids), AT_ONCE):
        some = ids[at : at + AT_ONCE]
        names = [id.encode() for id in some]
        texts = await slots.store.request(b"HMGET", PREFIX + b"held:" + slots.gateway, *names)
        for id, text in zip(some, texts, strict=True):
            if text is not None and text.startswith(b"g "):
                said = text.decode().split(" ")
                slots.given(id, said[3], int(said[4]))


def _question(slots: Slots, wanted: Wanted) -> tuple[bytes, ...]:
    wanted.told = wanted.preferred
    texts = [wanted.id, wanted.model, str(wanted.kind), wanted.key, str(wanted.cost), f"{wanted.weight:f}"]
    texts += ["1" if wanted.batch else "0", slots.length.decode(), *wanted.preferred]
    return (b"EVALSHA", _ASK, b"0", slots.gateway, *(text.encode() for text in texts))


async def _declare(slots: Slots, some: list[Wanted]) -> None:
    for first in range(0, len(some), AT_ONCE):
        parts: list[bytes] = []
        for wanted in some[first : first + AT_ONCE]:
            if slots.held.get(wanted.id) is not wanted:
                continue
            if wanted.node:
                last = b"1" if wanted.reads else b"0"
            else:
                last = b" ".join((wanted.score, *(word.encode() for word in wanted.preferred)))
            parts += [wanted.id.encode(), wanted.model.encode(), b"%d" % wanted.kind, wanted.node.encode(), last]
        if parts:
            await slots.store.request(b"EVALSHA", _DECLARE, b"0", slots.gateway, *parts)


async def _rebuild(slots: Slots) -> None:
    """See that the store grants: after a flush it does once every gateway has told what it holds."""
    store = slots.store
    if await store.request(b"EXISTS", GRANTS):
        return
    told = b""
    while True:
        # Flushed again while it was told, it has another epoch, and is told anew.
        await store.request(b"SET", EPOCH, b"%d" % time_ns(), b"NX")
        epoch = await store.request(b"GET", EPOCH) or b""
        if epoch != told:
            await renew(slots)
            told = epoch
        keys = (GRANTS, GRANTS + b"-told", GRANTS + b"-of", EPOCH)
        numbers = (b"%d" % slots.gateways(), b"%d" % PATIENCE_US, epoch)
        if await store.request(b"EVALSHA", _TELL, b"4", *keys, slots.gateway, *numbers) == 1:
            await renew(slots)  # what came free meanwhile is given to those who wait
            return
        await asyncio.sleep(0.02)
