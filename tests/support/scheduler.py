"""What the scheduler promises, checked from outside: a plain model of slots and tickets that keeps no order of its own.

It is told what was asked and what was given, and fails where a promise is broken. It knows nothing of how the ledger,
or the scripts in the store, find a place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from corral.fleet.tickets import LONG


@dataclass
class Told:
    """A request as the model knows it. ``at``: the number of the step it asked in."""

    id: str
    gateway: str
    model: str
    prompt: int
    embed: bool
    batch: bool
    at: int
    avoids: frozenset[str] = frozenset()
    """Nodes that it may not use."""


@dataclass
class Spot:
    """A model on a node as the leader last said it."""

    state: str
    generation: int
    slots: int


@dataclass
class Promises:
    """Everything that was asked and given, and what holds of it at any time."""

    spots: dict[tuple[str, str], Spot] = field(default_factory=dict)
    waiting: dict[str, Told] = field(default_factory=dict)
    running: dict[str, tuple[Told, str]] = field(default_factory=dict)
    reading: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    """Requests that were released or cancelled, or whose gateway died."""

    def used(self, node: str, model: str) -> int:
        return sum(1 for told, on in self.running.values() if on == node and told.model == model)

    def free(self, node: str, model: str) -> int:
        spot = self.spots.get((node, model))
        return spot.slots - self.used(node, model) if spot and spot.state == "resident" else 0

    def allows(self, node: str, told: Told) -> bool:
        """Whether the node's own limits allow it."""
        here = [other for other, on in self.running.values() if on == node]
        if told.embed:
            most = max([s.slots for (n, _), s in self.spots.items() if n == node and s.state == "resident"], default=0)
            return sum(other.embed for other in here) < max(1, most // 4)
        if told.prompt <= LONG:
            return True
        long = [other for other in here if other.id in self.reading]
        return not long or len(here) == len(long)

    def usable(self, told: Told) -> list[str]:
        """The nodes where it might run now."""
        return [
            node
            for node, model in self.spots
            if model == told.model
            and node not in told.avoids
            and self.free(node, model) > 0
            and self.allows(node, told)
        ]

    def given(self, told: Told, node: str) -> None:
        """A slot was given; raises AssertionError where it must not be."""
        assert told.id not in self.running, f"{told.id} runs twice"
        assert told.id not in self.ended, f"{told.id} has ended, and was given a slot"
        spot = self.spots.get((node, told.model))
        assert spot is not None and spot.state == "resident", f"{told.id} on a model that is {spot and spot.state}"
        assert self.free(node, told.model) > 0, f"{node} is over-committed by {told.id}"
        assert self.allows(node, told), f"{told.id} breaks a limit of {node}"
        assert node not in told.avoids, f"{told.id} is on {node}, which it avoids"
        self.waiting.pop(told.id, None)
        self.running[told.id] = told, node
        if told.prompt > LONG and not told.embed:
            self.reading.add(told.id)

    def over(self, id: str) -> None:
        """A request has ended."""
        self.running.pop(id, None)
        self.waiting.pop(id, None)
        self.reading.discard(id)
        self.ended.add(id)

    def settled(self) -> None:
        """What holds when nothing is under way: nobody waits whom a free slot would serve."""
        for told in self.waiting.values():
            assert not self.usable(told), f"{told.id} waits, though {self.usable(told)} would serve it"
