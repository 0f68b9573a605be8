"""A gateway's slots and tickets in the store: asked for, given back, kept alive, told again to a store that forgot.

What a gateway holds is kept here too, and each renewal tells the store all of it: what the store gave while nobody
heard is taken back, what it has lost it is told again. So no call needs to be repeated, and none counts twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from importlib.resources import files
from time import monotonic, time_ns
from typing import Any

import hiredis

from corral.store.budget import PREFIX, script, sha
from corral.store.valkey import Valkey, ValkeyDown, encode

RENEW = 2.0
POLL = 0.5
LEASE = 10.0
PATIENCE_US = 2_000_000
"""How long a store that was flushed waits for gateways that tell nothing before it grants."""
MOST = 256
"""Tickets of a model, at most."""
AT_ONCE = 200
GRANTS, EPOCH = PREFIX + b"slots-grant", PREFIX + b"slots-epoch"

_FOLDER = files("corral.store") / "scripts"


def _script(name: str) -> str:
    """The text of a script, after what those of slots share."""
    return (
        f"local P = '{PREFIX.decode()}'\n" + (_FOLDER / "slots.lua").read_text() + (_FOLDER / f"{name}.lua").read_text()
    )


def combined(limits: str) -> str:
    """One call for all of a request: the text of a script of limits (`corral.store.budget`), and a slot if they admit.

    ARGV  1 how many arguments ask for the slot, 2.. those (as of `slots_ask.lua`), then those of the limits.
    Returns {the limits' answer, the slot's or 0 (REBUILD)}, without the second where the limits refuse, or 0.
    """
    return (
        f"local function limits(KEYS, ARGV)\n{limits}\nend\n"
        f"local P = '{PREFIX.decode()}'\n"
        + (_FOLDER / "slots.lua").read_text()
        + f"local function slot(ARGV)\n{(_FOLDER / 'slots_ask.lua').read_text()}\nend\n"
        + "local last = tonumber(ARGV[1]) + 1\n"
        + "local verdict = limits(KEYS, { unpack(ARGV, last + 1) })\n"
        + "if verdict == 0 then return 0 end\n"
        + "if verdict[1] == 0 then return { verdict } end\n"
        + "return { verdict, slot({ unpack(ARGV, 2, last) }) }\n"
    )


ASK, END, PLACE = _script("slots_ask"), _script("slots_end"), _script("slots_place")
LIVE, DECLARE = _script("slots_live"), _script("slots_declare")
TELL = f"if redis.call('GET', '{EPOCH.decode()}') ~= ARGV[4] then return 0 end\n" + script("rebuild", metered=False)
"""As in a rebuild of limits, for who has told a store that has the epoch of the last argument."""
SCRIPTS = (ASK, END, PLACE, LIVE, DECLARE, TELL)
_ASK, _END, _PLACE, _LIVE, _DECLARE, _TELL = (sha(text) for text in SCRIPTS)

log = logging.getLogger(__name__)


class Wanted:
    """What asks for a slot, in the store's words. ``cost`` is us of a slot, ``kind`` as in `corral.fleet.tickets`."""

    __slots__ = (
        "batch",
        "cost",
        "generation",
        "id",
        "key",
        "kind",
        "model",
        "node",
        "preferred",
        "reads",
        "score",
        "weight",
    )

    def __init__(
        self,
        id: str,
        model: str,
        kind: int = 0,
        key: str = "-",
        cost: int = 1_000_000,
        weight: float = 1.0,
        batch: bool = False,
        preferred: tuple[str, ...] = (),
    ) -> None:
        self.id = id.encode()
        self.model = model.encode()
        self.kind = b"%d" % kind
        self.key = key.encode()
        self.cost = b"%d" % cost
        self.weight = b"%f" % weight
        self.batch = b"1" if batch else b"0"
        self.preferred = tuple(node.encode() for node in preferred)
        self.node = b""
        """Where it has a slot; empty while it waits."""
        self.generation = 0
        self.reads = kind == 1
        self.score = b"0"


class Answer:
    """What a request hears: a ``node``, or its ``position`` among so many ``slots``, or that too many wait.

    ``away``: the store could not be asked, or does not grant yet.
    """

    __slots__ = ("away", "full", "node", "position", "slots")

    def __init__(
        self, node: str = "", position: int = 0, slots: int = 0, full: bool = False, away: bool = False
    ) -> None:
        self.node = node
        self.position = position
        self.slots = slots
        self.full = full
        self.away = away


Heard = Callable[[Answer], None]


class Slots:
    """One gateway's. `run` keeps them; ``store`` is its connection, and ``ears`` one that hears what it is given."""

    def __init__(self, store: Valkey, ears: Valkey, gateway: str, lease: float = LEASE) -> None:
        self.store = store
        self.ears = ears
        self.gateway = gateway.encode()
        self.lease = lease
        self.held: dict[bytes, Wanted] = {}
        self._waiting: dict[bytes, Heard] = {}
        self._channel = PREFIX + b"wake:" + self.gateway
        self.gateways: Callable[[], int] = lambda: 1
        """How many gateways there are, at most: so many are waited for when the store has forgotten."""
        self.on_lost: Callable[[], None] = _nothing
        ears.on_message = self._woken

    def ask(self, wanted: Wanted, heard: Heard) -> None:
        """Ask for a slot. `heard` gets an answer; after one with a position a second one, with the node, follows."""

        def replied(reply: Any) -> None:
            if wanted.id not in self.held:
                # It was ended meanwhile: the store is told once it has answered.
                if type(reply) is list and reply[0] != 3:
                    self._end(wanted.id)
                return
            if type(reply) is not list:
                del self.held[wanted.id]
                if reply == 0:
                    self.on_lost()
                elif isinstance(reply, hiredis.ReplyError):
                    log.error("the store refused the script of slots: %s", reply)
                    self.store.reset()
                heard(Answer(away=True))
            elif reply[0] == 1:
                wanted.node, wanted.generation = reply[1], reply[2]
                heard(Answer(wanted.node.decode()))
            elif reply[0] == 2:
                self._waiting[wanted.id] = heard
                wanted.score = reply[3]
                heard(Answer(position=reply[1], slots=reply[2]))
            else:
                del self.held[wanted.id]
                heard(Answer(full=True, position=reply[1]))

        self.held[wanted.id] = wanted
        self.store.call(encode(*self._question(wanted)), replied)

    def end(self, id: str) -> None:
        """Give a slot back, or a ticket up."""
        name = id.encode()
        if self.held.pop(name, None) is not None:
            self._waiting.pop(name, None)
            self._end(name)

    def read(self, id: str) -> None:
        """The prompt has been read: the node may begin another long one."""
        wanted = self.held.get(id.encode())
        if wanted is not None and wanted.reads and wanted.node:
            wanted.reads = False
            self._end(b"read " + wanted.id)

    @property
    def waiting(self) -> int:
        """Tickets of this gateway."""
        return len(self._waiting)

    async def place(self, node: str, model: str, state: str, generation: int, slots: int, step: float) -> bool:
        """What the leader says of a place; False where a later word is known.

        Raises:
            ValkeyDown, hiredis.ReplyError: the store did not hear of it.
        """
        numbers = (b"%d" % generation, b"%d" % slots, b"%d" % step)
        names = (node.encode(), model.encode(), state.encode())
        return bool(await self.store.request(b"EVALSHA", _PLACE, b"0", *names, *numbers))

    # -- what keeps them

    async def keep(self) -> None:
        """Renew each two seconds and look after tickets each half, until cancelled."""
        renewed = -self.lease
        lost = asyncio.Event()
        self.on_lost = lost.set
        while True:
            try:
                if self.store.connected:
                    lost.clear()
                    # Also where nothing is asked: others wait for what this one has to tell.
                    await self._rebuild()
                    if monotonic() - renewed >= self.lease / LEASE * RENEW:
                        await self._renew()
                        renewed = monotonic()
                    await self._poll()
            except (OSError, ValkeyDown, hiredis.ReplyError) as error:
                log.warning("slots were not renewed: %s", error)
            try:
                async with asyncio.timeout(POLL):
                    await lost.wait()
            except TimeoutError:
                pass

    async def listen(self) -> None:
        """Hear what is given to tickets, until cancelled; the connection is made anew when it is lost."""

        def subscribe() -> None:
            self.ears.enqueue(encode(b"SUBSCRIBE", self._channel), _ignore)

        self.ears.on_connect = subscribe
        await self.ears.run()

    def _woken(self, message: Any) -> None:
        if type(message) is list and message[0] == b"message":
            id, node, generation = message[2].split(b" ")
            self._given(id, node, int(generation))

    def _given(self, id: bytes, node: bytes, generation: int) -> None:
        heard, wanted = self._waiting.pop(id, None), self.held.get(id)
        if heard is None or wanted is None:
            return
        wanted.node, wanted.generation = node, generation
        heard(Answer(node.decode()))

    def _end(self, what: bytes) -> None:
        # Unheard, it is made good by the next renewal.
        self.store.call(encode(b"EVALSHA", _END, b"0", self.gateway, what), _ignore)

    async def _renew(self) -> None:
        known = list(self.held)
        arguments = (self.gateway, b"%d" % (self.lease * 1e6), *known)
        missing = await self.store.request(b"EVALSHA", _LIVE, b"0", *arguments)
        await self._declare([self.held[id] for id in missing if id in self.held and id in known])

    async def _poll(self) -> None:
        """Ask again for what has waited longest of each model and kind, and hear what was given while nobody heard."""
        ids = list(self._waiting)
        first: dict[tuple[bytes, bytes], Wanted] = {}
        for id in ids:
            wanted = self.held[id]
            first.setdefault((wanted.model, wanted.kind), wanted)
        for wanted in first.values():
            if wanted.id not in self._waiting:
                continue
            reply = await self.store.request(*self._question(wanted))
            if type(reply) is list and reply[0] == 1:
                self._given(wanted.id, reply[1], reply[2])
        for at in range(0, len(ids), AT_ONCE):
            some = ids[at : at + AT_ONCE]
            texts = await self.store.request(b"HMGET", PREFIX + b"held:" + self.gateway, *some)
            for id, text in zip(some, texts, strict=True):
                if text is not None and text.startswith(b"g "):
                    words = text.split(b" ")
                    self._given(id, words[3], int(words[4]))

    def _question(self, wanted: Wanted) -> tuple[bytes, ...]:
        request = (self.gateway, wanted.id, wanted.model, wanted.kind, wanted.key, wanted.cost, wanted.weight)
        return (b"EVALSHA", _ASK, b"0", *request, wanted.batch, b"%d" % MOST, *wanted.preferred)

    async def _declare(self, some: list[Wanted]) -> None:
        for first in range(0, len(some), AT_ONCE):
            parts: list[bytes] = []
            for wanted in some[first : first + AT_ONCE]:
                if wanted.id not in self.held:
                    continue
                last = (b"1" if wanted.reads else b"0") if wanted.node else wanted.score
                parts += [wanted.id, wanted.model, wanted.kind, wanted.node, last]
            if parts:
                await self.store.request(b"EVALSHA", _DECLARE, b"0", self.gateway, *parts)

    async def _rebuild(self) -> None:
        """See that the store grants: after a flush it does once every gateway has told what it holds."""
        if await self.store.request(b"EXISTS", GRANTS):
            return
        told = b""
        while True:
            # Flushed again while it was told, it has another epoch, and is told anew.
            await self.store.request(b"SET", EPOCH, b"%d" % time_ns(), b"NX")
            epoch = await self.store.request(b"GET", EPOCH) or b""
            if epoch != told:
                await self._renew()
                told = epoch
            keys = (GRANTS, GRANTS + b"-told", GRANTS + b"-of")
            numbers = (b"%d" % self.gateways(), b"%d" % PATIENCE_US, epoch)
            if await self.store.request(b"EVALSHA", _TELL, b"3", *keys, self.gateway, *numbers) == 1:
                return
            await asyncio.sleep(0.02)


def _nothing() -> None:
    """What happens where nobody listens."""


def _ignore(_: Any) -> None:
    """An answer that nobody waits for."""
