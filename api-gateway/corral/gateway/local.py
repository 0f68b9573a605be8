"""Slots while the store is away: this gateway's share of each place, in a ledger of its own.

A model may be used where it is in memory, and where it is nowhere on each node that holds it: Ollama loads it by
itself. What runs already counts, and what is given here is told to the store as soon as that is back: from its
connection on nothing is given here, and nothing by the store before it has heard of all that runs.
"""

from __future__ import annotations

from collections.abc import Iterable

from corral.fleet.ledger import Grant, Ledger
from corral.fleet.node import Node, NodeState
from corral.fleet.pools import counted, model_of
from corral.fleet.slots import PlaceState, own_slots, step_of
from corral.fleet.tickets import EMBED_KIND, LONG, LONG_KIND, PICKY, Request, Ticket
from corral.gateway.snapshot import Pool, Snapshot
from corral.store.slots import Answer, Heard, Slots, Wanted

RESIDENT, ABSENT = PlaceState.RESIDENT, PlaceState.ABSENT


class Waiting:
    """Who waits here: what was asked for, of which pool, and who hears of its turn."""

    def __init__(self, wanted: Wanted, heard: Heard, pool: Pool, model: str) -> None:
        self.wanted, self.heard, self.pool, self.model = wanted, heard, pool, model


class Local:
    """The share. ``active``: it counts; ``names`` are the gateways that share, as last seen."""

    def __init__(self, slots: Slots, gateway: str, length: int) -> None:
        self._slots, self._gateway, self._length = slots, gateway, length
        self.names: list[str] = [gateway]
        self.active = False
        self.ledger = Ledger(length)
        self.waiting: dict[str, Waiting] = {}
        self._generation = 0
        self._looked: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._shares: dict[tuple[str, str, int], int] = {}
        self._shared: tuple[str, ...] = ()

    def ask(self, wanted: Wanted, heard: Heard, snapshot: Snapshot, pool: Pool, model: str, now: float) -> Answer:
        """A slot of this gateway's share, or a ticket (`heard` gets the node in its turn), or that too many wait."""
        self._look(snapshot, pool, model, wanted.model, now)
        self._slots.forget(wanted)
        found = self.ledger.ask(_request(wanted, self._gateway), wanted.preferred, now)
        if isinstance(found, Grant):
            self._slots.claim(wanted, found.node)
            return Answer(found.node)
        if isinstance(found, Ticket):
            self.waiting[wanted.id] = Waiting(wanted, heard, pool, model)
            return Answer(position=self.ledger.position(wanted.id, wanted.model), slots=self.ledger.slots(wanted.model))
        return Answer(full=True, position=self._length)

    def hold(self, wanted: Wanted, now: float) -> None:
        """Count what the store has given, until this ledger ends."""
        if wanted.id not in self.ledger.grants:
            self.ledger.hold(_request(wanted, self._gateway), wanted.node, now)

    def end(self, id: str, now: float) -> None:
        """A request gives its slot back, or its ticket up."""
        if self.drop(id) is None:
            self._serve(self.ledger.release(id, now))

    def read(self, id: str, now: float) -> None:
        """See `Ledger.read`."""
        self._serve(self.ledger.read(id, now))

    def drop(self, id: str) -> Waiting | None:
        """Give a ticket up, if there is one."""
        one = self.waiting.pop(id, None)
        if one is not None:
            self.ledger.cancel(id, one.wanted.model)
        return one

    def prefer(self, wanted: Wanted, now: float) -> None:
        """One that waits here is kept from other nodes than before."""
        queue = self.ledger.queues.get(wanted.model)
        ticket = queue.tickets.get(wanted.id) if queue is not None else None
        if ticket is not None:
            ticket.preferred = wanted.preferred
            self._serve(self.ledger.serve(wanted.model, now))

    def look(self, snapshot: Snapshot, now: float) -> None:
        """See what has become of the nodes that somebody waits for."""
        for one in list(self.waiting.values()):
            self._serve(self._look(snapshot, one.pool, one.model, one.wanted.model, now))

    def end_all(self) -> list[Waiting]:
        """The store is back: those who wait, in their order. What runs it is told (`Slots.held`)."""
        order: list[tuple[float, str]] = []
        for id, one in self.waiting.items():
            ticket = self.ledger.queues[one.wanted.model].tickets.get(id)
            order.append((ticket.score if ticket is not None else 0.0, id))
        order.sort()
        found = [self.waiting[id] for _, id in order]
        self.waiting, self.active, self.ledger, self._looked = {}, False, Ledger(self._length), {}
        return found

    def begin(self, now: float) -> None:
        """Count from now on; what runs is in use."""
        self.active = True
        for wanted in self._slots.held.values():
            if wanted.node:
                self.ledger.hold(_request(wanted, self._gateway), wanted.node, now)

    def _look(self, snapshot: Snapshot, pool: Pool, model: str, counted: str, now: float) -> list[Grant]:
        """Bring the places of a model to what the snapshot says."""
        stamp = (snapshot.version, tuple(self.names))
        if self._looked.get(counted) == stamp:
            return []
        self._looked[counted] = stamp
        resident = {node.name for node in places(pool.nodes.values(), model)}
        given: list[Grant] = []
        for node in pool.nodes.values():
            place = self.ledger.places.get((node.name, counted))
            state = RESIDENT if node.name in resident else ABSENT
            if place is None and state is ABSENT:
                continue
            slots = self._share(node.name, counted, node.slots, stamp[1])
            if place is None or place.state is not state or place.slots != slots:
                self._generation += 1
                number = self._generation
                given += self.ledger.place(node.name, counted, state, number, now, slots, step_of(slots, 0, 0))
        return given

    def _share(self, node: str, model: str, slots: int, names: tuple[str, ...]) -> int:
        if names != self._shared or len(self._shares) > 10_000:
            self._shares, self._shared = {}, names
        mine = self._shares.get((node, model, slots))
        if mine is None:
            mine = self._shares[node, model, slots] = own_slots(names, self._gateway, node, model, slots)
        return mine

    def _serve(self, given: list[Grant]) -> None:
        for grant in given:
            one = self.waiting.pop(grant.request.id, None)
            if one is not None:
                self._slots.claim(one.wanted, grant.node)
                one.heard(Answer(grant.node))


def places(nodes: Iterable[Node], model: str) -> list[Node]:
    """Where a model may be used as long as no leader says it: where it is in memory, else where it can be loaded."""
    ready = [node for node in nodes if node.state is NodeState.READY and model in node.held]
    return [node for node in ready if model in node.resident] or ready


def stand_in(slots: Slots, snapshot: Snapshot) -> None:
    """Nobody leads: say where the models may be used that are waited for, as far as this gateway knows."""
    for name in {wanted.model for wanted in slots.held.values() if not wanted.node}:
        model = model_of(name)
        members = snapshot.nodes.values()
        group = [node for node in members if counted(model, snapshot.group_of.get(node.name, "")) == name]
        slots.stand(name, [(node.name, node.slots) for node in places(group, model)])


def _request(wanted: Wanted, gateway: str) -> Request:
    kind = wanted.kind % PICKY
    return Request(
        wanted.id,
        gateway,
        wanted.model,
        wanted.key,
        LONG + 1 if kind == LONG_KIND and wanted.reads else 0,
        wanted.cost / 1e6,
        wanted.weight,
        wanted.batch,
        kind == EMBED_KIND,
        wanted.kind >= PICKY,
    )
