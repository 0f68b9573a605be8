"""A fleet in discrete events: the scheduler's own functions, driven by a trace and by nodes that are said, not made.

A request takes its prompt's tokens / prefill + its answer's tokens / decode seconds of a slot, whatever else runs, as
on the simulated back end (`corral.node.simulated`); a load takes a fixed time.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from corral.fleet.demand import Mean, Rate
from corral.fleet.dispatch import Affinity
from corral.fleet.ledger import Grant, Ledger
from corral.fleet.placement import Action, Demand, Host, Planner, Stand
from corral.fleet.slots import PlaceState
from corral.fleet.tickets import Request

BLOCK = 512
"""Tokens of a block of a prompt that a node's cache knows as one (Mooncake's traces)."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: when (seconds), for which model, tokens of prompt and answer, ids of the prompt's blocks."""

    at: float
    model: str
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Shape:
    """A fleet: ``nodes`` with ``room`` for so many models, ``load`` in seconds, ``prefill`` and ``decode`` in tokens/s.

    ``cache``: a slot keeps the last prompt's blocks, so that they need not be read again; ``tick``: seconds between two
    decisions of the placement, ``quick`` where it hurries (`Planner.hurries`).
    """

    nodes: int = 4
    room: int = 2
    load: float = 8.0
    prefill: float = 2500.0
    decode: float = 60.0
    slots: int = 4
    cache: bool = False
    tick: float = 0.5
    quick: float = 0.1


@dataclass(slots=True)
class Outcome:
    """What came of it: seconds to the first token of each request in the order of arrival, loads, and their reasons."""

    first: list[float] = field(default_factory=list)
    loads: int = 0
    reasons: list[tuple[float, str]] = field(default_factory=list)


class Caches:
    """The prompts that the slots of each place hold: as many as there are slots, the last used ones."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._prompts: dict[tuple[str, str], list[tuple[int, ...]]] = {}

    def read(self, node: str, asked: Asked) -> int:
        """Tokens of the prompt that must be read there; from now on it is known."""
        if not self._shape.cache or not asked.blocks:
            return asked.prompt
        known = self._prompts.setdefault((node, asked.model), [])
        best, at = 0, -1
        for number, blocks in enumerate(known):
            same = next((i for i, (a, b) in enumerate(zip(blocks, asked.blocks, strict=False)) if a != b), None)
            same = min(len(blocks), len(asked.blocks)) if same is None else same
            if same > best:
                best, at = same, number
        if at >= 0 and 2 * best > len(known[at]):
            known.pop(at)  # the same conversation; else the slot that was not used for longest is taken
        known.append(asked.blocks)
        del known[: -self._shape.slots]
        return max(1, asked.prompt - BLOCK * best)

    def clear(self, node: str, model: str) -> None:
        """The model left the node."""
        self._prompts.pop((node, model), None)


class Simulation:
    """One run of Corral's scheduler. `resident`: every model stands on every node, whatever the room."""

    def __init__(self, shape: Shape, models: Sequence[str], resident: bool = False, affinity: bool = True) -> None:
        self.shape = shape
        self.names = list(models)
        self.ledger = Ledger(queue_length=1 << 30)
        self.outcome = Outcome()
        self._events: list[tuple[float, int, str, str, str]] = []
        self._number = 0
        self._asked: list[Asked] = []
        self._caches = Caches(shape)
        self._affinity = Affinity() if affinity else None
        self._rates = {model: Rate(0.0) for model in models}
        self._seconds = {model: Mean(4.0) for model in models}
        self._generation = 0
        self._left = 0
        nodes = [f"node-{number + 1}" for number in range(shape.nodes)]
        self.hosts = [Host(node, max_models=shape.room, slots=shape.slots, held=frozenset(models)) for node in nodes]
        # Without room for all, a fleet starts with nothing loaded.
        for host in self.hosts if resident else ():
            for model in models:
                self._say(host, model, PlaceState.RESIDENT, 0.0)
        self.planned = not resident

    def run(self, asked: Sequence[Asked]) -> Outcome:
        """All of the requests, to the last one's end."""
        self._asked = list(asked)
        self._left = len(asked)
        self.outcome.first = [0.0] * len(asked)
        for number, request in enumerate(asked):
            self._at(request.at, "arrive", str(number))
        if self.planned:
            self._at(0.0, "tick")
        while self._events and self._left:
            now, _, what, one, other = heapq.heappop(self._events)
            if what == "arrive":
                self._arrive(one, now)
            elif what == "first":
                self.outcome.first[int(one)] = now - self._asked[int(one)].at
                self._start(self.ledger.read(one, now), now)
            elif what == "end":
                self._end(one, now)
            elif what == "loaded":
                self._say(self._host(one), other, PlaceState.RESIDENT, now)
            else:
                self._tick(now)
        return self.outcome

    # -- requests

    def _arrive(self, id: str, now: float) -> None:
        asked = self._asked[int(id)]
        self._rates[asked.model].note(now)
        preferred = self._affinity.preferred(list(asked.blocks)) if self._affinity else ()
        request = Request(id, "g", asked.model, "", asked.prompt, self._seconds[asked.model].value)
        answer = self.ledger.ask(request, preferred, now)
        if isinstance(answer, Grant):
            self._start([answer], now)

    def _start(self, grants: list[Grant], now: float) -> None:
        for grant in grants:
            asked = self._asked[int(grant.request.id)]
            read = self._caches.read(grant.node, asked)
            if self._affinity:
                self._affinity.note(list(asked.blocks), grant.node)
            first = now + read / self.shape.prefill
            self._at(first, "first", grant.request.id)
            self._at(first + asked.output / self.shape.decode, "end", grant.request.id)
            self._host(grant.node).places[grant.model].in_use += 1

    def _end(self, id: str, now: float) -> None:
        grant = self.ledger.grants[id]
        self._seconds[grant.model].note(now - grant.since)
        stand = self._host(grant.node).places[grant.model]
        stand.in_use -= 1
        self._left -= 1
        self._start(self.ledger.release(id, now), now)

    # -- placement

    def _tick(self, now: float) -> None:
        demands = {}
        for name in self.names:
            queue = self.ledger.queues.get(name)
            waiting = len(queue) if queue is not None else 0
            oldest = queue.oldest() if queue is not None else None
            demands[name] = Demand(
                name,
                self._rates[name].value(now),
                waiting,
                now - oldest if oldest is not None else 0.0,
                self._seconds[name].value,
                self.shape.load,
            )
        planner = Planner(self.hosts, demands, now)
        steps = planner.plan()
        pause = self.shape.quick if planner.hurries else self.shape.tick
        for step in steps:
            host = self._host(step.node)
            self.outcome.reasons.append((now, f"{step.action} {step.model} on {step.node}: {step.reason}"))
            if step.action is Action.LOAD:
                host.coming = ""
                self.outcome.loads += 1
                self._say(host, step.model, PlaceState.LOADING, now)
                self._at(now + self.shape.load, "loaded", host.name, step.model)
            elif step.action is Action.DRAIN:
                host.coming = step.wanted
                self._say(host, step.model, PlaceState.DRAINING, now)
            else:
                self._say(host, step.model, PlaceState.ABSENT, now)
                self._caches.clear(host.name, step.model)
        self._at(now + pause, "tick")

    def _say(self, host: Host, model: str, state: PlaceState, now: float) -> None:
        self._generation += 1
        if state is PlaceState.ABSENT:
            del host.places[model]
        else:
            stand = host.places.get(model)
            host.places[model] = Stand(state, now, stand.in_use if stand else 0, host.slots)
        self._start(self.ledger.place(host.name, model, state, self._generation, now, host.slots), now)

    def _host(self, node: str) -> Host:
        return self.hosts[int(node.rpartition("-")[2]) - 1]

    def _at(self, when: float, what: str, one: str = "", other: str = "") -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, what, one, other))
