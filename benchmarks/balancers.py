"""The ways to balance that `benchmarks/fleet` compares with: each request goes to a node at once, and waits there.

A node does what Ollama does (`corral.node.scheduler`): a request for a model that is in memory waits for one of its
slots; one for another model waits its turn to load, for which a model must become idle first, one that nobody uses if
there is such a one. A model that is to go is given further requests all the same.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence

from corral.fleet.simulation import Asked, Outcome, Shape


class Loaded:
    """A model in a node's memory: requests that run, that wait for a slot, and when it was last asked for."""

    def __init__(self) -> None:
        self.running = 0
        self.queue: deque[int] = deque()
        self.used = 0
        self.leaves = False

    @property
    def uses(self) -> int:
        return self.running + len(self.queue)


class Node:
    """One Ollama."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.loaded: dict[str, Loaded] = {}
        self.pending: deque[int] = deque()
        self.loading = ""
        self.outstanding = 0


Choice = Callable[[Sequence[Node], str, int], Node]


def round_robin(nodes: Sequence[Node], model: str, number: int) -> Node:
    """One after the other."""
    return nodes[number % len(nodes)]


def least_connections(nodes: Sequence[Node], model: str, number: int) -> Node:
    """Who has the fewest requests, in turn among equals."""
    return min(nodes, key=lambda node: (node.outstanding, (node.number - number) % len(nodes)))


def residency(nodes: Sequence[Node], model: str, number: int) -> Node:
    """Who has the model in memory, among those the one with the fewest requests: however many that are."""
    having = [node for node in nodes if model in node.loaded or node.loading == model]
    return least_connections(having or nodes, model, number)


class Balanced:
    """One run of nodes behind a balancer."""

    def __init__(self, shape: Shape, choose: Choice) -> None:
        self.shape = shape
        self.choose = choose
        self.nodes = [Node(number) for number in range(shape.nodes)]
        self.outcome = Outcome()
        self._events: list[tuple[float, int, str, int, int]] = []
        self._serial = 0
        self._asked: Sequence[Asked] = ()

    def run(self, asked: Sequence[Asked]) -> Outcome:
        """All of the requests, to the last one's end."""
        self._asked = asked
        self.outcome.first = [0.0] * len(asked)
        for number, request in enumerate(asked):
            self._at(request.at, "arrive", number, 0)
        while self._events:
            now, _, what, number, place = heapq.heappop(self._events)
            if what == "arrive":
                node = self.choose(self.nodes, asked[number].model, number)
                node.outstanding += 1
                loaded = node.loaded.get(asked[number].model)
                if loaded is None:
                    node.pending.append(number)
                else:
                    self._join(node, loaded, number, now)
            elif what == "end":
                node = self.nodes[place]
                node.outstanding -= 1
                loaded = node.loaded[asked[number].model]
                loaded.running -= 1
                self._run(node, loaded, now)
            else:
                node = self.nodes[place]
                node.loaded[node.loading] = Loaded()
                node.loading = ""
            self._acquire(node, now)
        return self.outcome

    def _join(self, node: Node, loaded: Loaded, number: int, now: float) -> None:
        self._serial += 1
        loaded.used = self._serial
        loaded.queue.append(number)
        self._run(node, loaded, now)

    def _run(self, node: Node, loaded: Loaded, now: float) -> None:
        while loaded.queue and loaded.running < self.shape.slots:
            number = loaded.queue.popleft()
            loaded.running += 1
            asked = self._asked[number]
            first = now + asked.prompt / self.shape.prefill
            self.outcome.first[number] = first - asked.at
            self._at(first + asked.output / self.shape.decode, "end", number, node.number)

    def _acquire(self, node: Node, now: float) -> None:
        """The first of those that wait for a load: one at a time, in their order."""
        for name in [name for name, loaded in node.loaded.items() if loaded.leaves and not loaded.uses]:
            del node.loaded[name]
        while node.pending and not node.loading:
            number = node.pending[0]
            model = self._asked[number].model
            loaded = node.loaded.get(model)
            if loaded is not None:
                node.pending.popleft()
                self._join(node, loaded, number, now)
                continue
            if len(node.loaded) >= self.shape.room:
                name, victim = min(node.loaded.items(), key=lambda one: (one[1].uses > 0, one[1].used))
                victim.leaves = True
                if victim.uses:
                    return
                del node.loaded[name]
            node.loading = model
            self.outcome.loads += 1
            self._at(now + self.shape.load, "loaded", number, node.number)

    def _at(self, when: float, what: str, number: int, place: int) -> None:
        self._serial += 1
        heapq.heappush(self._events, (when, self._serial, what, number, place))
