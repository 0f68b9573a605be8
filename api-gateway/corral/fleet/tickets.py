"""Tickets: who waits for a slot of a model, and in which order they are served.

The order is that of virtual start times, in seconds of one clock (Virtual Clock: L. Zhang, SIGCOMM 1990): each ticket
of a key starts when the key's last one would have been done, had the key the model for itself in proportion to its
weight. So a key that asks for little is ahead of one that asks for much, and as time goes on, a new ticket starts after
every old one: whoever waits is overtaken for `AHEAD_MAX` at most, a batch for `BATCH_LATER` more.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Final

AHEAD_MAX: Final = 30.0
"""How far into the future the tickets of a key may start (seconds)."""
BATCH_LATER: Final = 60.0
"""How much later a batch's ticket starts: an interactive request that comes within this time is served before it."""

LONG: Final = 8192
"""Tokens from which a prompt is long: it is read alone among its kind on a node."""
SHORT_KIND: Final = 0
LONG_KIND: Final = 1
EMBED_KIND: Final = 2
PICKY: Final = 3
"""Is added to the kind of a request that may not use every node: it holds up none of those that may."""
KINDS: Final = range(2 * PICKY)
SCAN: Final = 64
"""So many picky tickets of a kind are looked at for one that may use a slot: they do not avoid the same nodes."""
LATE: Final = "!"
NEVER: Final = "~"
"""Before the name of a node among those that a request prefers: it is used only where the model is resident on no
other, or not at all."""
HEAD: Final = "^"
"""Among the nodes that a request prefers: if it waits, then at the head. It had its turn, and a node failed it. With a
number behind it: as if it had come so many us ago, for it has waited elsewhere. Neither is turned away."""
AEON: Final = 1e9
"""So much earlier than others starts who waits at the head (seconds)."""
LOAD_SHARE: Final = 1.5
"""A load that takes so many times what it should is still waited for."""


class Request:
    """What asks for a slot.

    ``cost`` is the seconds of a slot that it will take at a guess, ``prompt`` its tokens, ``weight`` its key's; its
    ``kind`` is one of `KINDS`. `embed`: it is for embeddings, and one of at most 64 inputs. `picky`: it avoids nodes.
    """

    __slots__ = ("batch", "cost", "gateway", "id", "key", "kind", "model", "prompt", "weight")

    def __init__(
        self,
        id: str,
        gateway: str,
        model: str,
        key: str = "",
        prompt: int = 0,
        cost: float = 1.0,
        weight: float = 1.0,
        batch: bool = False,
        embed: bool = False,
        picky: bool = False,
    ) -> None:
        self.id = id
        self.gateway = gateway
        self.model = model
        self.key = key
        self.prompt = prompt
        self.cost = cost
        self.weight = weight
        self.batch = batch
        self.kind = (EMBED_KIND if embed else LONG_KIND if prompt > LONG else SHORT_KIND) + (PICKY if picky else 0)

    def __repr__(self) -> str:
        return f"<request {self.id} of {self.key or 'nobody'} for {self.model}>"


class Ticket:
    """A request that waits, from ``since`` on; ``score`` is its virtual start time (seconds)."""

    __slots__ = ("preferred", "request", "score", "since")

    def __init__(self, request: Request, preferred: tuple[str, ...], score: float, since: float) -> None:
        self.request = request
        self.preferred = preferred
        self.score = score
        self.since = since

    def __repr__(self) -> str:
        return f"<ticket {self.request.id} at {self.score:g}>"


class Queue:
    """The tickets of one model: of each kind in the order in which they are served.

    Whether a slot may be used depends on the kind, and of picky ones on the nodes that they avoid: it is enough to look
    at the first of each.
    """

    __slots__ = ("_finish", "orders", "tickets")

    def __init__(self) -> None:
        self.orders: list[list[tuple[float, str]]] = [[] for _ in KINDS]
        self.tickets: dict[str, Ticket] = {}
        self._finish: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.tickets)

    def add(self, request: Request, preferred: tuple[str, ...], now: float, slots: int) -> Ticket:
        """Make a ticket; `slots` is how many the model has, all places together."""
        start, finish = start_time(self._finish.get(request.key, 0.0), now, request.cost, request.weight, slots)
        if len(self._finish) > 2 * len(self.tickets) + 64:
            self._finish = {key: time for key, time in self._finish.items() if time > now}
        self._finish[request.key] = finish
        since = head(preferred)
        if since == "":
            score = now - AEON
        else:
            score = (now - int(since) / 1e6 if since else start) + (BATCH_LATER if request.batch else 0.0)
        ticket = Ticket(request, preferred, score, now)
        self.put(ticket)
        return ticket

    def put(self, ticket: Ticket) -> None:
        """Put a ticket where its score belongs: one that had a slot, and lost it with its node, is first again."""
        insort(self.orders[ticket.request.kind], (ticket.score, ticket.request.id))
        self.tickets[ticket.request.id] = ticket

    def remove(self, id: str) -> Ticket | None:
        """Take a ticket out, if it is there."""
        ticket = self.tickets.pop(id, None)
        if ticket is not None:
            order = self.orders[ticket.request.kind]
            del order[bisect_left(order, (ticket.score, id))]
        return ticket

    def heads(self) -> list[Ticket]:
        """The first of each kind, in the order in which they are served; of picky ones those of each avoided set."""
        found = [order[0] for order in self.orders[:PICKY] if order]
        for order in self.orders[PICKY:]:
            known: set[tuple[str, ...]] = set()
            for one in order[:SCAN]:
                avoided = marks(self.tickets[one[1]].preferred)
                if avoided not in known:
                    known.add(avoided)
                    found.append(one)
        return [self.tickets[id] for _, id in sorted(found)]

    def position(self, id: str) -> int:
        """How many are served up to this one, itself counted; 0 where it does not wait."""
        ticket = self.tickets.get(id)
        if ticket is None:
            return 0
        return sum([bisect_left(order, (ticket.score, id)) for order in self.orders]) + 1

    def oldest(self) -> float | None:
        """When the one that waits longest began to, or None."""
        return min([ticket.since for ticket in self.tickets.values()], default=None)


def marks(preferred: tuple[str, ...]) -> tuple[str, ...]:
    """The nodes that a request avoids, in the words for them."""
    return tuple([word for word in preferred if word[0] in (LATE, NEVER)])


def head(preferred: tuple[str, ...]) -> str | None:
    """What stands behind `HEAD` among the nodes that a request prefers, or None without it."""
    for word in preferred:
        if word[0] == HEAD:
            return word[1:]
    return None


def start_time(finish: float, now: float, cost: float, weight: float, slots: int) -> tuple[float, float]:
    """When a ticket starts, and when its key's next one would: virtual times in seconds.

    `finish` is when the key's last one would have been done; `cost` the seconds of a slot that this one takes.
    """
    start = min(max(now, finish), now + AHEAD_MAX)
    return start, start + cost / (max(weight, 0.01) * max(1, slots))


def estimate(position: int, slots: int, seconds: float, load: float = 0.0) -> float:
    """Seconds that the ticket at `position` waits at a guess.

    `slots` are the model's, each taken for `seconds` by a request; `load` is how long it takes until there are any.
    """
    if position <= 0:
        return 0.0
    return load + position * seconds / max(1, slots)


def wait_bound(queue_wait: float, load: float, drain: float, placed: bool) -> float:
    """How long a request may wait (seconds) before it is refused.

    One for a model that is nowhere waits for a load, and for the room that must be made for it, whatever the queue's
    own bound is.
    """
    return queue_wait if placed else max(queue_wait, LOAD_SHARE * load + drain)
