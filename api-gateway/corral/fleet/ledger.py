"""Who holds which slot, and who waits for one: the one state of the scheduler, changed by pure steps.

The scripts in the store do the same with the same names, for all gateways together; a gateway without a store does it
by itself with what is its share. The tests hold both to the same model. No step waits or looks at a clock: time is
given, and what a step gives away is what it returns.

A slot is given in the order of tickets. A ticket further back is served first only where no one ahead of it may use the
slot: a node takes one long prompt at a time beside other requests, more of them where it does nothing else, and a share
of embeddings.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from corral.fleet.slots import FULL, STEP, Place, PlaceState
from corral.fleet.tickets import EMBED_KIND, LATE, LONG_KIND, NEVER, PICKY, SHORT_KIND, Queue, Request, Ticket, head

RESIDENT = PlaceState.RESIDENT
EMBED_SHARE = 4
"""One of so many slots of a node may do embeddings, and at least one."""
LEASE = 10.0
"""How long a gateway that says nothing keeps its slots (seconds)."""
CANDIDATES = 16
"""How many places with a free slot are looked at for one whose node's limits allow the request."""


class Grant:
    """A slot that was given: to whom, and where. It ends by `Ledger.release`."""

    __slots__ = ("generation", "model", "node", "request", "since")

    def __init__(self, request: Request, place: Place, now: float) -> None:
        self.request = request
        self.node = place.node
        self.model = place.model
        self.generation = place.generation
        self.since = now

    def __repr__(self) -> str:
        return f"<{self.request.id} on {self.node}>"


class Busy:
    """What a node does, all models together: requests, those of them that read a long prompt, and embeddings."""

    __slots__ = ("embeds", "long", "requests", "slots")

    def __init__(self) -> None:
        self.requests = 0
        self.long: dict[str, None] = {}
        self.embeds = 0
        self.slots = 0

    def takes(self, request: Request) -> bool:
        """Whether its limits allow a request, where it has a slot."""
        kind = request.kind % PICKY
        if kind == EMBED_KIND:
            return self.embeds < max(1, self.slots // EMBED_SHARE)
        return kind == SHORT_KIND or not self.long or self.requests <= len(self.long)


class Ledger:
    """Slots and tickets of a fleet. Times are seconds of one clock."""

    def __init__(self, queue_length: int = 256) -> None:
        self.queue_length = queue_length
        self.places: dict[tuple[str, str], Place] = {}
        self.grants: dict[str, Grant] = {}
        self.queues: dict[str, Queue] = {}
        self.leases: dict[str, float] = {}
        self.busy: dict[str, Busy] = {}
        self._order: dict[str, list[tuple[float, str]]] = {}
        self._slots: dict[str, int] = {}

    # -- what the leader says

    def place(
        self,
        node: str,
        model: str,
        state: PlaceState,
        generation: int,
        now: float,
        slots: int = 1,
        step: float = STEP,
    ) -> list[Grant]:
        """Take over the state of a model on a node; what becomes free by it is given to those who wait.

        A word with an older generation than the last is not heeded.
        """
        place = self.places.get((node, model))
        if place is None:
            place = self.places[node, model] = Place(node, model, slots, step)
        elif generation < place.generation:
            return []
        self._out(place)
        place.state, place.generation, place.slots, place.step = state, generation, slots, step
        self._in(place)
        busy = self.busy.setdefault(node, Busy())
        here = [other.slots for other in self.places.values() if other.node == node and other.state is RESIDENT]
        busy.slots = max(here, default=0)
        if state is PlaceState.ABSENT and not place.in_use:
            del self.places[node, model]
        return self._serve_node(node, model, now)

    # -- what gateways ask

    def ask(self, request: Request, preferred: tuple[str, ...], now: float) -> Grant | Ticket | None:
        """A slot, on a node of `preferred` if one of them has a free one; else a ticket, or None where too many wait.

        `preferred` may have nodes to avoid too (`LATE`, `NEVER`: of a request that is picky), and `HEAD`. The same
        again for a request that has asked already.
        """
        grant = self.grants.get(request.id)
        if grant is not None:
            return grant
        queue = self.queues.get(request.model)
        if queue is None:
            queue = self.queues[request.model] = Queue()
        ticket = queue.tickets.get(request.id)
        if ticket is not None:
            return ticket
        self.leases.setdefault(request.gateway, now + LEASE)  # who asks need not know any more what it holds
        # One of its kind that waits may use no slot, else it had one: nor may this, unless they avoid other nodes.
        if request.kind >= PICKY or not queue.orders[request.kind]:
            place = self._find(request, preferred)
            if place is not None:
                return self._give(request, place, now)
        if len(queue) >= self.queue_length and head(preferred) is None:
            return None
        return queue.add(request, preferred, now, self._slots.get(request.model, 0))

    def hold(self, request: Request, node: str, now: float) -> None:
        """Count a request that runs on a node already, whoever let it."""
        place = self.places.get((node, request.model))
        if place is None:
            place = self.places[node, request.model] = Place(node, request.model)
            self.busy.setdefault(node, Busy())
        self._give(request, place, now)

    def release(self, id: str, now: float) -> list[Grant]:
        """End a request; its slot goes to the first who may use it. Nothing happens for one that holds none."""
        grant = self.grants.pop(id, None)
        if grant is None:
            return []
        place = self.places[grant.node, grant.model]
        self._out(place)
        place.in_use -= 1
        self._in(place)
        busy = self.busy[grant.node]
        busy.requests -= 1
        busy.long.pop(id, None)
        if grant.request.kind % PICKY == EMBED_KIND:
            busy.embeds -= 1
        if place.state is PlaceState.ABSENT and not place.in_use:
            del self.places[grant.node, grant.model]
        return self._serve_node(grant.node, grant.model, now)

    def read(self, id: str, now: float) -> list[Grant]:
        """A request's prompt has been read: the first token is there, and the next long prompt may come."""
        grant = self.grants.get(id)
        if grant is None or id not in self.busy[grant.node].long:
            return []
        del self.busy[grant.node].long[id]
        return self._serve_node(grant.node, "", now)

    def cancel(self, id: str, model: str) -> bool:
        """Give a ticket up; whether there was one."""
        queue = self.queues.get(model)
        return queue is not None and queue.remove(id) is not None

    def requeue(self, id: str, since: float, score: float, preferred: tuple[str, ...], now: float) -> list[Grant]:
        """Take a slot back from a request whose node died, and let it wait where it stood: at the head."""
        grant = self.grants.get(id)
        if grant is None:
            return []
        request = grant.request
        self.queues.setdefault(request.model, Queue()).put(Ticket(request, preferred, score, since))
        return self.release(id, now)

    def renew(self, gateway: str, now: float) -> None:
        """A gateway says that it lives."""
        self.leases[gateway] = now + LEASE

    def expire(self, now: float) -> list[Grant]:
        """Take back what gateways held whose lease has run out."""
        gone = [gateway for gateway, until in self.leases.items() if until <= now]
        if not gone:
            return []
        for gateway in gone:
            del self.leases[gateway]
        for model, queue in self.queues.items():
            for ticket in list(queue.tickets.values()):
                if ticket.request.gateway in gone:
                    self.cancel(ticket.request.id, model)
        given: list[Grant] = []
        for grant in list(self.grants.values()):
            if grant.request.gateway in gone:
                given += self.release(grant.request.id, now)
        return given

    def serve(self, model: str, now: float) -> list[Grant]:
        """Give what is free of a model: what those who wait avoid may have changed."""
        return self._serve(model, "", now)

    def position(self, id: str, model: str) -> int:
        """See `Queue.position`."""
        queue = self.queues.get(model)
        return 0 if queue is None else queue.position(id)

    def slots(self, model: str) -> int:
        """Slots of the model, free or not, where it is resident."""
        return self._slots.get(model, 0)

    # -- the order of places

    def _in(self, place: Place) -> None:
        if place.state is RESIDENT:
            insort(self._order.setdefault(place.model, []), (place.load, place.node))
            self._slots[place.model] = self._slots.get(place.model, 0) + place.slots

    def _out(self, place: Place) -> None:
        if place.state is RESIDENT:
            order = self._order[place.model]
            del order[bisect_left(order, (place.load, place.node))]
            self._slots[place.model] -= place.slots

    def _find(self, request: Request, preferred: tuple[str, ...]) -> Place | None:
        """Where a request may run now: where it prefers to, else where there is least to do."""
        model = request.model
        marked = {word[1:] for word in preferred if word[0] in (LATE, NEVER)}
        for node in preferred:
            if node not in marked and self._usable(node, request):
                return self.places[node, model]
        order = self._order.get(model, [])
        known = [node for _, node in order if node in marked] if marked else []
        for load, node in order[: CANDIDATES + len(known)]:
            if load >= FULL:
                break
            if node not in marked and self.busy[node].takes(request):
                return self.places[node, model]
        if len(known) == len(order):
            for word in preferred:
                if word[0] == LATE and self._usable(word[1:], request):
                    return self.places[word[1:], model]
        return None

    def _usable(self, node: str, request: Request) -> bool:
        place = self.places.get((node, request.model))
        return place is not None and place.free > 0 and self.busy[node].takes(request)

    def _give(self, request: Request, place: Place, now: float) -> Grant:
        self._out(place)
        place.in_use += 1
        self._in(place)
        busy = self.busy[place.node]
        busy.requests += 1
        if request.kind % PICKY == EMBED_KIND:
            busy.embeds += 1
        elif request.kind % PICKY == LONG_KIND:
            busy.long[request.id] = None
        grant = self.grants[request.id] = Grant(request, place, now)
        return grant

    def _serve(self, model: str, node: str, now: float) -> list[Grant]:
        """Give what is free to those who wait, in their order. `node` is where something has become free, if any."""
        queue, free = self.queues.get(model), (node,) if node else ()
        given: list[Grant] = []
        while queue is not None and len(queue):
            for ticket in queue.heads():
                place = self._find(ticket.request, ticket.preferred + free)
                if place is not None:
                    queue.remove(ticket.request.id)
                    given.append(self._give(ticket.request, place, now))
                    break
            else:
                break
        return given

    def _serve_node(self, node: str, first: str, now: float) -> list[Grant]:
        """`_serve` for every model on a node: what it does for one bounds what it may do for another."""
        given = self._serve(first, node, now) if first else []
        for model, queue in self.queues.items():
            if model != first and len(queue) and (node, model) in self.places:
                given += self._serve(model, node, now)
        return given
