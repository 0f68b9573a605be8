"""A gateway's slots and tickets in the store: asked for, given back, and what the store does not know told to it.

What a gateway holds is kept here too, and each renewal (`corral.store.keeper`) tells the store all of it: what the
store gave while nobody heard is taken back, what it has lost it is told again. So no call needs to be repeated, and
none counts twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from math import inf
from time import monotonic
from typing import Any, Final

import hiredis

from corral.store.lua import PREFIX, sha, slots_script
from corral.store.valkey import Valkey, encode, words

LEASE: Final = 10.0
MOST: Final = 256
"""Tickets of a model, at most."""
KINDS: Final = 6
"""Of requests, numbered as in `corral.fleet.tickets`."""
KNOWN_MAX: Final = 4096
GRANTS: Final = PREFIX + b"slots-grant"
EPOCH: Final = PREFIX + b"slots-epoch"
QUIET: Final = 3.0
"""How long a leader may say nothing to the store before it is no more (seconds); control keeps its word as long."""
ANEW: Final = 0.5
"""Seconds in which a lost connection is made anew where the store is there."""
EARLY_MAX: Final = 4.0
"""For how long (seconds) a store is waited for that does not grant: longer than a flushed one waits for gateways."""
WORDS: Final = 9
"""How many arguments ask for a slot, besides the nodes that are preferred."""

ASK, END, DECLARE = slots_script("slots_ask"), slots_script("slots_end"), slots_script("slots_declare")
STAND = slots_script("slots_stand")
_ASK, _END, _DECLARE, _STAND = sha(ASK), sha(END), sha(DECLARE), sha(STAND)

log = logging.getLogger(__name__)


class Wanted:
    """What asks for a slot, in the store's words. ``cost`` is us of a slot, ``kind`` as in `corral.fleet.tickets`.

    ``node`` is where it has a slot, empty while it waits; ``reads``: its prompt is long and not read yet. ``told`` are
    the ``preferred`` that the store has heard of.
    """

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
        "told",
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
        self.id = id
        self.model = model
        self.kind = kind
        self.key = key
        self.cost = cost
        self.weight = weight
        self.batch = batch
        self.preferred = self.told = preferred
        self.node = ""
        self.generation = 0
        self.reads = kind % 3 == 1
        self.score = b"0"


class Answer:
    """What a request hears: a ``node``, or its ``position`` among so many ``slots``, or that too many wait.

    ``away``: the store could not be asked. ``load`` is how long a load of the model takes (seconds), said where it has
    no slots.
    """

    __slots__ = ("away", "full", "load", "node", "position", "slots")

    def __init__(
        self,
        node: str = "",
        position: int = 0,
        slots: int = 0,
        full: bool = False,
        away: bool = False,
        load: float = 0.0,
    ) -> None:
        self.node = node
        self.position = position
        self.slots = slots
        self.full = full
        self.away = away
        self.load = load


Heard = Callable[[Answer], None]


class Slots:
    """One gateway's.

    ``held`` is all that it holds or waits for, ``waiting`` who hears of a ticket's turn. ``early`` are those who came
    while the store was there and did not grant, for it is still told of what is held: they are asked for once it does,
    with when they came (monotonic seconds). ``told`` is the store's connection (`Valkey.connections`) on which it was
    told of what is held; ``until`` is when the lease ends if it is not renewed (monotonic seconds); ``led``: somebody
    says what stands where, ``was_led``: somebody has. ``length`` is how many may wait for a model, as the store reads
    it, ``quiet`` for how long a leader may say nothing to a store that was flushed (seconds). ``unheard``: slots were
    given here without the store.
    """

    def __init__(self, store: Valkey, gateway: str, length: int = MOST, lease: float = LEASE) -> None:
        self.store = store
        self.gateway = gateway.encode()
        self.lease = lease
        self.held: dict[str, Wanted] = {}
        self.waiting: dict[str, Heard] = {}
        self.early: dict[str, tuple[Wanted, Heard, float]] = {}
        self.told = 0
        self.until = inf
        self.led = self.was_led = False
        self.channel = PREFIX + b"wake:" + self.gateway
        self.gateways: Callable[[], int] = lambda: 1
        """How many gateways there are, at most: so many are waited for when the store has forgotten."""
        self.on_lost: Callable[[], None] = _nothing
        """Called when the store is to be told of what is held: it has forgotten, or there is a connection again."""
        self.on_back: Callable[[], None] = _nothing
        """Called when the store is back: from now on nobody else grants."""
        self.quiet = QUIET
        self.length = b"%d" % length
        self._early_since = 0.0
        self.unheard = False
        self._ungranted = -inf
        self._ending: list[bytes] = []
        self._known: dict[tuple[str, int, str], bytes] = {}
        self._name = words(self.gateway)

    @property
    def counts(self) -> bool:
        """Whether the store has heard of what this gateway holds, on the connection that it has now."""
        return self.store.connected and self.told == self.store.connections

    @property
    def usable(self) -> bool:
        """Whether it may be asked for a slot: nobody came before, while it did not grant."""
        return self.counts and not self.early

    @property
    def missed(self) -> bool:
        """Whether the store is away, or has refused for longer than it should to hear what this gateway holds."""
        if self._early_since > 0.0 and monotonic() - self._early_since > EARLY_MAX:
            return True
        # Who stood still has lost its lease too: others have its share by now, unless the store is truly away.
        return not self.store.connected and (not self.lapsed or monotonic() - self.store.lost > ANEW)

    @property
    def lapsed(self) -> bool:
        """Whether the lease is over: what the store gave before may be another's by now."""
        return monotonic() > self.until

    def connected(self) -> None:
        """There is a connection again."""
        if not self.early:  # who waits already does so no longer for a connection that flaps
            self._early_since = 0.0
        if self.unheard and monotonic() - self._ungranted >= self.lease:
            self._ungrant()
        self.on_back()
        self.on_lost()

    def _ungrant(self) -> None:
        """Have the store give nothing before every gateway has told what it holds: this one has given slots without it,
        and others may have. The first word on a connection; not on each, or one that flaps would stop them all."""
        self._ungranted = monotonic()
        self.store.call(encode(b"DEL", GRANTS, EPOCH, GRANTS + b"-told"), _ignore)

    # -- asking

    def ask(self, wanted: Wanted, heard: Heard) -> None:
        """Ask for a slot. `heard` gets an answer; after one with a position another one, with the node, follows.

        Where the store is there, and does not grant yet, that is a position too, and it may be said again.
        """
        if self.usable:
            self._ask(wanted, heard)
        elif self.missed:
            heard(Answer(away=True))
        else:
            self._later(wanted, heard)

    def catch_up(self) -> None:
        """Ask for those who came while the store did not grant, as if it had been then."""
        self.on_back()
        early, self.early, self._early_since = self.early, {}, 0.0
        now = monotonic()
        for wanted, heard, since in early.values():
            if not any([word[0] == "^" for word in wanted.preferred]):
                wanted.preferred = (f"^{max(0, int((now - since) * 1e6))}", *wanted.preferred)
            self._ask(wanted, heard)

    def stand(self, model: str, slots: Iterable[tuple[str, int]]) -> None:
        """Say where a model may be used, while there is no leader: all such nodes, and the slots of each."""
        parts: list[bytes] = []
        for node, count in slots:
            parts += (node.encode(), b"%d" % count)
        quiet = b"%d" % (self.quiet * 1e6) if self.was_led else b"0"
        self.store.call(encode(b"EVALSHA", _STAND, b"0", model.encode(), quiet, *parts), _ignore)

    def _later(self, wanted: Wanted, heard: Heard) -> None:
        now = monotonic()
        if not self._early_since:
            self._early_since = now
        self.early[wanted.id] = wanted, heard, now
        self.on_lost()
        heard(Answer(position=len(self.early)))

    def _ask(self, wanted: Wanted, heard: Heard) -> None:
        self.flush()  # what a request gives back comes before what it asks for
        self.held[wanted.id] = wanted
        wanted.told = wanted.preferred
        command = b"*%d\r\n%b%b" % (3 + WORDS + len(wanted.preferred), _ASK_WORDS, self._arguments(wanted))

        def replied(reply: Any) -> None:
            self.answered(wanted, heard, reply)

        self.store.call(command, replied)

    def together(self, wanted: Wanted) -> tuple[int, bytes]:
        """The arguments that ask for a slot in a call that does more (`corral.store.lua.combined`): how many, and they.

        The answer is for `answered`, or there is none, and `forget` is called.
        """
        if self._ending:
            self.flush()
        self.held[wanted.id] = wanted
        count = WORDS + len(wanted.preferred)
        number = _COUNTS[count] if count < len(_COUNTS) else words(b"%d" % count)
        return count + 1, number + self._arguments(wanted)

    def answered(self, wanted: Wanted, heard: Heard, reply: Any) -> None:
        """The store's answer to a request for a slot."""
        id = wanted.id
        if self.held.get(id) is not wanted:
            # It was ended meanwhile: the store is told once it has answered.
            if type(reply) is list and reply[0] != 3:
                self._end(id.encode())
            return
        if type(reply) is not list:
            del self.held[id]
            refused = isinstance(reply, hiredis.ReplyError)
            if reply == 0 or not (refused or self.missed):
                self._later(wanted, heard)
                return
            if refused:
                log.error("the store refused the script of slots: %s", reply)
                self.store.reset()
            heard(Answer(away=True))
        elif reply[0] == 1 and self.lapsed:
            # This gateway stood still: the next renewal says whether the slot is its own, else it waits at the head.
            self.waiting[id] = heard
            self.on_lost()
            heard(Answer(position=1, slots=1))
        elif reply[0] == 1:
            wanted.node, wanted.generation = reply[1].decode(), reply[2]
            heard(Answer(wanted.node))
        elif reply[0] == 2:
            self.waiting[id] = heard
            wanted.score = reply[3]
            heard(Answer(position=reply[1], slots=reply[2], load=reply[4] / 1e6 if len(reply) > 4 else 0.0))
        else:
            del self.held[id]
            heard(Answer(full=True, position=reply[1]))

    def forget(self, wanted: Wanted) -> None:
        """Nothing was asked for it after all, or nobody knows."""
        if self.held.get(wanted.id) is wanted:
            del self.held[wanted.id]

    def given(self, id: str, node: str, generation: int) -> None:
        """A ticket has its turn; not where the lease is over: the next renewal says whether it still has."""
        if self.lapsed:
            self.on_lost()
            return
        heard, wanted = self.waiting.pop(id, None), self.held.get(id)
        if heard is None or wanted is None:
            return
        wanted.node, wanted.generation = node, generation
        heard(Answer(node))

    def woken(self, message: Any) -> None:
        """A message of the channel on which the store tells of tickets."""
        if type(message) is list and message[0] == b"message":
            id, node, generation = message[2].split(b" ")
            self.given(id.decode(), node.decode(), int(generation))

    def claim(self, wanted: Wanted, node: str) -> None:
        """Count a request that runs on a node whatever the store says; it is told now, or when it can be."""
        wanted.node = node
        self.held[wanted.id] = wanted
        if not self.store.connected:
            self.unheard = True
        else:
            self.flush()  # the ticket that it had is given up first
            reads = b"1" if wanted.reads else b"0"
            parts = (wanted.id.encode(), wanted.model.encode(), b"%d" % wanted.kind, node.encode(), reads)
            self.store.call(encode(b"EVALSHA", _DECLARE, b"0", self.gateway, *parts), _ignore)

    # -- giving back

    def end(self, id: str) -> None:
        """Give a slot back, or a ticket up."""
        if self.held.pop(id, None) is not None:
            self.waiting.pop(id, None)
            self._end(id.encode())
        elif self.early:
            self.early.pop(id, None)

    def read(self, id: str) -> None:
        """The prompt has been read: the node may begin another long one."""
        wanted = self.held.get(id)
        if wanted is not None and wanted.reads and wanted.node:
            wanted.reads = False
            self._end(b"read " + id.encode())

    def _end(self, what: bytes) -> None:
        # One command for all that ended in a turn. Unheard, it is made good by the next renewal.
        if not self.store.connected:
            return
        if not self._ending:
            self.store.soon(self.flush)
        self._ending.append(what)

    def flush(self) -> None:
        """Tell the store now of what has ended."""
        if self._ending:
            ending, self._ending = self._ending, []
            command = b"*%d\r\n%b%b%b" % (4 + len(ending), _END_WORDS, self._name, words(*ending))
            self.store.call(command, _ignore)

    def _arguments(self, wanted: Wanted) -> bytes:
        about = self._known.get((wanted.model, wanted.kind, wanted.key))
        if about is None:
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            about = words(wanted.model.encode(), b"%d" % wanted.kind, wanted.key.encode())
            self._known[wanted.model, wanted.kind, wanted.key] = about
        id, cost = wanted.id.encode(), b"%d" % wanted.cost
        rest = _INTERACTIVE if not wanted.batch and wanted.weight == 1.0 else _rest(wanted)
        text = b"%b$%d\r\n%b\r\n%b$%d\r\n%b\r\n%b$%d\r\n%b\r\n" % (
            self._name,
            len(id),
            id,
            about,
            len(cost),
            cost,
            rest,
            len(self.length),
            self.length,
        )
        preferred = wanted.preferred
        return text + words(*[node.encode() for node in preferred]) if preferred else text


_ASK_WORDS: Final = words(b"EVALSHA", _ASK, b"0")
_END_WORDS: Final = words(b"EVALSHA", _END, b"0")
_INTERACTIVE: Final = words(b"1", b"0")
_COUNTS: Final = [words(b"%d" % count) for count in range(32)]


def _rest(wanted: Wanted) -> bytes:
    return words(b"%f" % wanted.weight, b"1" if wanted.batch else b"0")


def _nothing() -> None:
    """What happens where nobody listens."""


def _ignore(_: Any) -> None:
    """An answer that nobody waits for."""
