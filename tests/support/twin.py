"""What the store's scripts of slots do, in steps of the ledger: the one mapping by which tests hold the two together.

The ledger is the model; what stands here beside it is what only a store has: whether it grants, who listens, the
generation of places that are no more, and that a renewal gives nothing away before all that it takes back is counted.

What a script may choose freely is taken from what it did (`support.witness`) and checked to be allowed: the time, in
which order models are served that share a node, and which tickets of gateways that do not listen were put back.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from corral.fleet.ledger import LEASE, Grant, Ledger
from corral.fleet.slots import Place, PlaceState
from corral.fleet.tickets import EMBED_KIND, LONG, LONG_KIND, PICKY, Queue, Request, Ticket
from corral.store import keeper, slots
from support.transcript import SCRIPTS, P, counted, moved, orders, published, state
from support.witness import Call

RESIDENT, ABSENT = PlaceState.RESIDENT, PlaceState.ABSENT
LEASE_US = int(LEASE * 1e6)


class Differs(AssertionError):
    """The store did something else than the ledger."""


@dataclass
class Told:
    """What a call gave to those who waited: gateway, request, node and generation of each."""

    call: Call
    grants: list[tuple[str, str, str, int]] = field(default_factory=list)


class Twin:
    """The ledger of a store that has carried out the calls that `follow` was given, from a flush on."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        """Calls by script, and what came of them."""
        self._base = 0
        self._listens: dict[str, str] = {}
        self._flush()

    def _flush(self) -> None:
        self.ledger = Ledger()
        self._said: dict[tuple[str, str], tuple[int, int, float]] = {}
        self._grants = self._led = False

    # -- the calls

    def follow(self, calls: Iterator[Call]) -> Iterator[Told]:
        """Do what the store did, call by call.

        Raises:
            Differs: a reply, a grant or a count is another.
        """
        for call in calls:
            told = Told(call)
            try:
                self._carry_out(call, told)
            except Differs as error:
                raise Differs(f"{error}\nof {call.who} at {call.stamp}: {call.words}\nwhich did {call.inner}") from None
            yield told

    def _carry_out(self, call: Call, told: Told) -> None:
        command, words = call.words[0].upper(), call.words
        if command == "FLUSHALL":
            self._flush()
            self.done["flush"] += 1
        elif command == "SUBSCRIBE":
            self._listens[call.who] = words[1].rpartition(":")[2]
        elif command == "ECHO" and words[1].startswith("gone "):
            self._listens.pop(words[1].removeprefix("gone "), None)
        elif command in ("SET", "DEL") and words[1].encode() == keeper.LEADER:
            self._led = command == "SET"
        elif command == "DEL" and words[1].encode() == slots.GRANTS:
            self._grants = False
            self.done["ungranted"] += 1
        elif command == "EVAL":
            self._compare(call.reply)
            self.done["look"] += 1
        elif command == "EVALSHA":
            self._script(SCRIPTS[words[1]], words[3:], call, told)

    def _script(self, name: str, argv: list[str], call: Call, told: Told) -> None:
        self._orders, self._moved = orders(call), moved(call)
        now, given = self._time(call), list[Grant]()
        if name == "ask":
            expected: Any = self._ask(argv, now, call.reply)
            self.done[f"ask {['rebuild', 'grant', 'ticket', 'full'][expected[0] if expected else 0]}"] += 1
        elif name == "over":
            over = [until for until in self.ledger.leases.values() if self._micros(until) <= self._micros(now)]
            expected = [int(self._led), len(over)]
        elif name == "tell":
            expected = call.reply
            self._grants = self._grants or call.reply == 1
        else:
            step = {"end": self._end, "place": self._place, "stand": self._stand, "live": self._live}
            expected, given = (1, self._declare(argv, now)) if name == "declare" else step[name](argv, now)
        self.done[name] += 1
        self.done["told"] += len(given)
        if expected != call.reply:
            raise Differs(f"{name}: the store answers {call.reply}, the ledger {expected}")
        told.grants = [(*grant.request.id.split(" "), grant.node, grant.generation) for grant in given]  # type: ignore[misc]
        if told.grants != (sent := published(call)):
            raise Differs(f"{name}: the store gives {sent}, the ledger {told.grants}")
        if self._moved:
            raise Differs(f"put back though they listen, or do not wait: {self._moved}")

    def _ask(self, argv: list[str], now: float, reply: Any) -> Any:
        if not self._grants:
            return 0
        gateway, id, model, kind, key, cost, weight, batch, most, *preferred = argv
        request = self._request(gateway, id, model, kind, key, int(cost) / 1e6, float(weight), batch == "1")
        if (grant := self.ledger.grants.get(request.id)) is not None:
            return [1, grant.node.encode(), grant.generation]
        queue = self.ledger.queues.get(model)
        ticket = queue.tickets.get(request.id) if queue is not None else None
        if queue is not None and ticket is not None:
            if (again := self._again(queue, ticket, tuple(preferred), now)) is not None:
                return [1, again.node.encode(), again.generation]
        else:
            self.ledger.queue_length = int(most)
            found = self.ledger.ask(request, tuple(preferred), now)
            if found is None:
                return [3, len(self.ledger.queues[model])]
            if isinstance(found, Grant):
                return [1, found.node.encode(), found.generation]
            ticket, queue = found, self.ledger.queues[model]
            self._snap(queue, ticket, reply)
        score = self._micros(ticket.score)
        position = self.ledger.position(request.id, model)
        # Among those of one time the store counts only its own kind.
        position -= sum(
            other.request.kind != ticket.request.kind and other.score == ticket.score and other.request.id < request.id
            for other in queue.tickets.values()
        )
        total = self.ledger.slots(model)
        return [2, position, total, b"%d" % score] + ([] if total else [0])

    def _snap(self, queue: Queue, ticket: Ticket, reply: Any) -> None:
        """Have the time of a ticket in whole us, as the store does: else rounding might decide who is first."""
        if isinstance(reply, list) and reply[0] == 2 and self._micros(ticket.score) == int(reply[3]):
            queue.remove(ticket.request.id)
            ticket.score = self._seconds(int(reply[3]))
            queue.put(ticket)

    def _again(self, queue: Queue, ticket: Ticket, preferred: tuple[str, ...], now: float) -> Grant | None:
        """The first of its kind, or one that avoids nodes, asks again: it alone is looked at."""
        kind, id = ticket.request.kind, ticket.request.id
        if kind < PICKY and queue.orders[kind][0][1] != id:
            return None
        ticket.preferred = preferred
        alone = Queue()
        alone.put(ticket)
        given = self._with({ticket.request.model: alone}, lambda: self.ledger.serve(ticket.request.model, now))
        if not given:
            return None
        queue.remove(id)
        self.done["again"] += 1
        return given[0]

    def _end(self, argv: list[str], now: float) -> tuple[int, list[Grant]]:
        gateway, *whats = argv
        held, given = 0, list[Grant]()
        for what in whats:
            id = f"{gateway} {what.removeprefix('read ')}"
            grant = self.ledger.grants.get(id)
            if what.startswith("read "):
                if grant is not None and id in self.ledger.busy[grant.node].long:
                    given += self._freed(grant.node, "", lambda id=id: self.ledger.read(id, now))  # type: ignore[misc]
            elif grant is not None:
                held += 1
                step = lambda id=id: self.ledger.release(id, now)  # noqa: E731
                given += self._freed(grant.node, grant.model, step)
            else:
                self._take_back(id, now)
        return held, given

    def _place(self, argv: list[str], now: float) -> tuple[int, list[Grant]]:
        node, model, state = argv[0], argv[1], PlaceState(argv[2])
        generation, count, step = int(argv[3]), int(argv[4]), float(argv[5])
        if (node, model) in self._said and generation < self.ledger.places[node, model].generation:
            self.done["older word"] += 1
            return 0, []
        self._said[node, model] = generation, count, step
        change = lambda: self.ledger.place(node, model, state, generation, now, count, step)  # noqa: E731
        return 1, self._freed(node, model, change)

    def _stand(self, argv: list[str], now: float) -> tuple[int, list[Grant]]:
        if self._led or not self._grants:
            return 0, []
        model, counts = argv[0], dict(zip(argv[2::2], map(int, argv[3::2]), strict=True))
        places, changed = self.ledger.places, list[str]()

        def stand(node: str, state: PlaceState, generation: int, count: int, step: float) -> None:
            self._said[node, model] = generation, count, step
            self._quietly(lambda: self.ledger.place(node, model, state, generation, now, count, step))

        for node, place in [(node, place) for (node, of), place in places.items() if of == model]:
            if node not in counts and place.state is RESIDENT:
                stand(node, ABSENT, place.generation, place.slots, place.step)
        for node, count in counts.items():
            known = places.get((node, model))
            if known is None or known.state is not RESIDENT or known.slots != count:
                step = known.step if known is not None and known.slots == count else float(int(1e6 / count + 0.5))
                stand(node, RESIDENT, known.generation if known is not None else 0, count, step)
                changed.append(node)
        given: list[Grant] = []
        for node in changed:
            one = places[node, model]
            again = lambda one=one: self.ledger.place(  # noqa: E731
                one.node, model, RESIDENT, one.generation, now, one.slots, one.step
            )
            given += self._serving(node, model, again)
        return 1, given

    def _live(self, argv: list[str], now: float) -> tuple[list[bytes], list[Grant]]:
        gateway, lease, *held = argv
        runs = dict(zip(held[::2], held[1::2], strict=True))
        self.ledger.leases[gateway] = now + int(lease) / 1e6
        for id in self._held(gateway):
            if id.partition(" ")[2] not in runs:
                self._take_back(id, now)
                self.done["unknown"] += 1
        for other, until in list(self.ledger.leases.items()):
            if self._micros(until) <= self._micros(now):
                for id in self._held(other):
                    self._take_back(id, now)
                del self.ledger.leases[other]
                self.done["lapsed"] += 1
        missing = []
        for id, said in runs.items():
            known = self._runs(f"{gateway} {id}")
            if known is None or (said and known != said):
                missing.append(id.encode())
        self.done["missing"] += len(missing)
        given: list[Grant] = []
        if not missing and self._grants:
            names = list(self.ledger.queues)
            for model in sorted(names, key=lambda name: self._orders[0].index(name) if name in self._orders[0] else 99):
                given += self._with(self.ledger.queues, lambda model=model: self.ledger.serve(model, now))  # type: ignore[misc]
        return missing, given

    def _declare(self, argv: list[str], now: float) -> list[Grant]:
        gateway, *rest = argv
        self.ledger.leases.setdefault(gateway, now + LEASE)
        for id, model, kind, node, last in zip(*[iter(rest)] * 5, strict=True):
            request = self._request(gateway, id, model, kind)
            known = self._runs(request.id)
            if node:
                if known != f"{node} {last}":
                    self._take_back(request.id, now)
                    self.ledger.hold(request, node, now)
                    if last != "1":
                        self._quietly(lambda id=request.id: self.ledger.read(id, now))  # type: ignore[misc]
            elif known is None:
                score, *preferred = last.split(" ")
                ticket = Ticket(request, tuple(preferred), self._seconds(int(score)), now)
                self.ledger.queues.setdefault(model, Queue()).put(ticket)
        return []

    # -- steps of the ledger, as a store does them

    def _request(
        self,
        gateway: str,
        id: str,
        model: str,
        kind: str,
        key: str = "",
        cost: float = 1.0,
        weight: float = 1.0,
        batch: bool = False,
    ) -> Request:
        # Its name is the store's, for of two tickets of one time the first by name is served first.
        picky, base = divmod(int(kind), PICKY)
        prompt = LONG + 1 if base == LONG_KIND else 1
        return Request(
            f"{gateway} {id}", gateway, model, key, prompt, cost, weight, batch, base == EMBED_KIND, bool(picky)
        )

    def _held(self, gateway: str) -> list[str]:
        waiting = [id for queue in self.ledger.queues.values() for id in queue.tickets]
        return [id for id in (*self.ledger.grants, *waiting) if id.partition(" ")[0] == gateway]

    def _runs(self, id: str) -> str | None:
        """`runs_of` in the scripts; None where nothing is known."""
        grant = self.ledger.grants.get(id)
        if grant is not None:
            return f"{grant.node} {int(id in self.ledger.busy[grant.node].long)}"
        return "" if any(id in queue.tickets for queue in self.ledger.queues.values()) else None

    def _take_back(self, id: str, now: float) -> None:
        self._quietly(lambda: self.ledger.release(id, now))
        for model in self.ledger.queues:
            self.ledger.cancel(id, model)

    def _quietly(self, step: Callable[[], list[Grant]]) -> list[Grant]:
        """A step after which nobody is served."""
        return self._with({}, step)

    def _freed(self, node: str, first: str, step: Callable[[], list[Grant]]) -> list[Grant]:
        """A step by which something comes free, for nobody as long as the store does not grant."""
        return self._serving(node, first, step) if self._grants else self._quietly(step)

    def _serving(self, node: str, first: str, step: Callable[[], list[Grant]]) -> list[Grant]:
        """A step after which those are served who wait for a model that has stood on a node, in the store's order."""
        order = self._orders.pop(0) if self._orders else []
        queues = self.ledger.queues
        models = [model for model in dict.fromkeys((*order, *queues)) if model in queues]
        return self._with({one: queues[one] for one in models if one == first or (node, one) in self._said}, step)

    def _with(self, queues: dict[str, Queue], step: Callable[[], list[Grant]]) -> list[Grant]:
        """A step that knows of these queues alone, and of no ticket of a gateway that does not listen."""
        whole, listen = self.ledger.queues, set(self._listens.values())
        asks = any(queue is not whole.get(model) for model, queue in queues.items())
        deaf = [
            (queue, ticket)
            for queue in (() if asks else queues.values())
            for ticket in list(queue.tickets.values())
            if ticket.request.gateway not in listen
        ]
        for queue, ticket in deaf:
            queue.remove(ticket.request.id)
        self.ledger.queues = queues
        try:
            return step()
        finally:
            self.ledger.queues = whole
            for queue, ticket in deaf:
                score = self._moved.pop(ticket.request.id, None)
                if score is not None and score > self._micros(ticket.score):
                    ticket.score = self._seconds(score)
                    self.done["moved"] += 1
                queue.put(ticket)
            for (node, model), (generation, count, each) in self._said.items():
                if (node, model) not in self.ledger.places:  # a store does not forget the word
                    place = self.ledger.places[node, model] = Place(node, model, count, each)
                    place.generation = generation

    # -- times, and what is counted

    def _time(self, call: Call) -> float:
        """What the script took for now, as it shows in what it wrote; where it does not, it is the time of before."""
        for words in call.inner:
            if words[:3] == ["ZADD", f"{P}live", "NX"]:
                return self._seconds(int(words[3]) - LEASE_US)
            if words[:3] in (["ZRANGEBYSCORE", f"{P}live", "-inf"], ["ZCOUNT", f"{P}live", "-inf"]):
                return self._seconds(int(words[3]))
        return 0.0

    def _seconds(self, micros: int) -> float:
        # Relative to the first, so that a double holds them to far less than 1 us.
        self._base = self._base or micros
        return (micros - self._base) / 1e6

    def _micros(self, seconds: float) -> int:
        return round(seconds * 1e6) + self._base

    def _compare(self, dump: list[list[Any]]) -> None:
        """Hold all that a store has of slots to the ledger."""
        store, ledger = state(dump), self._state()
        for key in sorted({*store, *ledger}):
            if store.get(key) != ledger.get(key):
                raise Differs(f"{key}: the store has {store.get(key)}, the ledger {ledger.get(key)}")

    def _state(self) -> dict[str, Any]:
        ledger, found = self.ledger, defaultdict[str, Any](dict)
        for (node, model), place in ledger.places.items():
            found[f"used:{model}"][node] = place.in_use
            if (node, model) in self._said:
                found[f"places:{model}"][node] = f"{place.state} {place.generation} {place.slots} {place.step:.0f}"
            if place.state is RESIDENT:
                found[f"load:{model}"][node] = place.load
                found[f"total:{model}"] = ledger.slots(model)
        for node, busy in ledger.busy.items():
            counts = {"requests": busy.requests, "long": len(busy.long), "embeds": busy.embeds, "slots": busy.slots}
            found[f"busy:{node}"] = counts
        for model, queue in ledger.queues.items():
            for ticket in queue.tickets.values():
                request = ticket.request
                found[f"wait:{model}:{request.kind}"][request.id] = self._micros(ticket.score)
                gateway, _, id = request.id.partition(" ")
                found[f"held:{gateway}"][id] = " ".join(("t", model, str(request.kind), *ticket.preferred))
        for grant in ledger.grants.values():
            gateway, _, id = grant.request.id.partition(" ")
            reads = int(grant.request.id in ledger.busy[grant.node].long)
            words = ("g", grant.model, grant.request.kind, grant.node, grant.generation, reads)
            found[f"held:{gateway}"][id] = " ".join(map(str, words))
        found["live"] = {gateway: self._micros(until) for gateway, until in ledger.leases.items()}
        return counted(found)
