"""Which model stands on which node: what to load and what to unload next, and why. Pure; the leader carries it out.

A place goes absent → loading → resident → draining → absent. One that drains takes nothing new; once nothing runs on it
it is unloaded, and what the node says it holds (`/api/ps`) confirms it. A node does one such thing at a time.

What is compared is what callers wait (`corral.fleet.demand.cost`): a model gets the room of another where that shortens
the waiting by clearly more than it makes the other's longer, the time of the exchange counted. A model that is nowhere
and asked for gets room within a bound, whatever it costs others: see `PATIENCE`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from operator import attrgetter, itemgetter
from typing import NamedTuple

from corral.fleet.alike import Alike, Places
from corral.fleet.demand import cost
from corral.fleet.slots import PlaceState

PATIENCE = 0.5
"""A model that is nowhere gets room when its oldest request has waited so many times its load; sooner if that is worth
it."""
GAIN = 2.0
"""An exchange must save so many times what it costs."""
OVERDUE = 1.5
"""The oldest request of a model that is nowhere is overdue when it has waited so many times the load, or for so long
that a drain and a load just end within its bound (`corral.fleet.tickets.wait_bound`): see `Planner.overdue`."""
PERIOD = 60.0
"""The time in which an exchange must be worth it (seconds)."""
WORTH = 0.002
"""What a copy more must save where there is room for it (seconds of waiting in a second)."""
MOST = 32
"""So many nodes at most begin something anew in one plan; what else is worth it follows in the next, which is soon."""

_COUNTED = (PlaceState.LOADING, PlaceState.RESIDENT)


class Action(StrEnum):
    """What is to be done with a place."""

    LOAD = "load"
    DRAIN = "drain"
    UNLOAD = "unload"


@dataclass(slots=True)
class Demand:
    """A model, and what is asked of it. ``rate``: arrivals a second; ``oldest``: seconds that the oldest has waited.

    ``seconds``: how long a slot is taken by a request; ``load``: measured load time; ``size``: bytes in memory.
    """

    name: str
    rate: float = 0.0
    waiting: int = 0
    oldest: float = 0.0
    seconds: float = 4.0
    load: float = 10.0
    size: int = 0
    copies: int = 0
    """How many copies it has at least, demand or not."""
    pins: frozenset[str] = frozenset()
    """Nodes that it must not leave."""
    disabled: bool = False
    """Its callers are refused: it is loaded for nobody."""


@dataclass(slots=True)
class Stand:
    """A model on a node: since when (seconds) it is in its state, requests that run on it, its slots."""

    state: PlaceState
    since: float
    in_use: int = 0
    slots: int = 4
    idle: float = 0.0
    """Since when nothing has run on it."""


@dataclass(slots=True)
class Host:
    """A node: what it may hold, and what it does. ``memory`` in bytes and ``max_models``: 0 is no bound known."""

    name: str
    ready: bool = True
    memory: int = 0
    max_models: int = 0
    slots: int = 4
    held: frozenset[str] = frozenset()
    """Models that are on its disk."""
    places: dict[str, Stand] = field(default_factory=dict)
    coming: str = ""
    """The model that it makes room for (`Step.wanted`), until that loads."""

    @property
    def moves(self) -> bool:
        """Whether it loads or drains something now."""
        return any(stand.state not in (PlaceState.RESIDENT, PlaceState.ABSENT) for stand in self.places.values())


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do, and the reason in words. ``wanted``: the model for which another one is drained."""

    action: Action
    node: str
    model: str
    reason: str
    wanted: str = ""


class _Best(NamedTuple):
    saves: float
    number: int
    """Of the model, in their order."""
    host: int
    model: Demand
    victim: str


class Planner:
    """Decides; a snapshot in, steps out. Nothing is remembered but what it counts within one call.

    Places that are alike are judged once (`corral.fleet.alike`), and what cannot be the best is not looked at: nothing
    saves more than its model gains by a copy, less what the least missed place is worth.
    """

    def __init__(
        self, hosts: Sequence[Host], models: Mapping[str, Demand], now: float, queue_wait: float = 30.0
    ) -> None:
        self._queue_wait = queue_wait
        self.hosts = [host for host in hosts if host.ready]
        self.models = models
        self.now = now
        self.steps: list[Step] = []
        self.notes: dict[str, str] = {}
        """Of models that wait and get nothing: why."""
        self.slots: dict[str, int] = {}
        self.copies: dict[str, int] = {}
        self.cut = False
        """Whether more may be worth it than was decided (`MOST`)."""
        self._costs: dict[tuple[str, int], float] = {}
        for host in self.hosts:
            for name, stand in host.places.items():
                if stand.state in _COUNTED:
                    self._count(name, stand.slots)
            if host.coming and host.moves and host.coming not in host.places:
                self._count(host.coming, host.slots)
        self._places = Places(self.hosts, models, {host.name for host in hosts if host.moves}, now)
        self._ranked: list[Alike] = []
        """Places that may go where that is worth it, the least missed first."""
        self._judge(self._places.of)

    def plan(self) -> list[Step]:
        """What is to be done now."""
        for host in self.hosts:
            for name, stand in host.places.items():
                if stand.state is PlaceState.DRAINING and not stand.in_use:
                    self.steps.append(Step(Action.UNLOAD, host.name, name, "nothing runs on it any more"))
        most = len(self.steps) + MOST
        for model, least in self._due():
            if len(self.steps) >= most:
                break
            self._make_room(model, least)
        while len(self.steps) < most and (best := self._best()) is not None:
            reason = f"saves callers {best.saves:.2g} s of waiting a second"
            self._exchange(best.model, best.host, best.victim, reason)
        self.cut = len(self.steps) >= most
        return self.steps

    @property
    def hurries(self) -> bool:
        """Whether the next look is to be soon, after `plan`: something leaves, somebody waits for what is nowhere, or
        not all was decided.

        Every load that room is made for is put off by two looks: one sees that nothing runs any more, one that the node
        is empty.
        """
        if self.cut or any(step.action is not Action.LOAD for step in self.steps):
            return True
        if any(stand.state is PlaceState.DRAINING for host in self.hosts for stand in host.places.values()):
            return True
        return any(model.waiting and not self.copies.get(model.name) for model in self.models.values())

    def cost(self, model: Demand, more: int = 0) -> float:
        """What the model's callers wait with so many slots more."""
        slots = self.slots.get(model.name, 0) + more
        found = self._costs.get((model.name, slots))
        if found is None:
            found = cost(model.rate, model.waiting, model.seconds, model.load, slots)
            self._costs[model.name, slots] = found
        return found

    def overdue(self, model: Demand) -> bool:
        """Whether a model that is nowhere must have room now, or its oldest request is refused before it is there."""
        latest = max(PATIENCE * model.load, self._queue_wait - model.load)
        return model.oldest >= min(OVERDUE * model.load, latest)

    def _judge(self, names: Iterable[str]) -> None:
        """Bring to the present count what depends on how many copies these models have."""
        names = set(names)
        ranked = [alike for alike in self._ranked if alike.model not in names]
        for name in names:
            for alike in self._places.of.get(name, ()):
                other = alike.demand
                alike.lasts = PERIOD
                if other is not None:
                    alike.base = self.cost(other, -alike.slots) - self.cost(other)
                    if self.copies.get(name, 0) <= 1:
                        # The last copy of a model comes back when that is next asked for.
                        alike.lasts = min(PERIOD, 1.0 / max(1e-9, other.rate))
                    if alike.pinned or not alike.rested or self.copies.get(name, 0) <= other.copies:
                        continue
                ranked.append(alike)
        ranked.sort(key=attrgetter("base"))
        self._ranked = ranked

    # -- models that get room whatever it costs others

    def _due(self) -> list[tuple[Demand, str]]:
        found: list[tuple[float, Demand, str]] = []
        for model in self.models.values():
            copies = self.copies.get(model.name, 0)
            for node in model.pins:
                number = self._places.numbers.get(node)
                if number is not None and model.name not in self.hosts[number].places:
                    found.append((-1e9, model, f"pinned to {node}"))
            if copies < model.copies:
                found.append((-1e6 - model.oldest, model, f"{copies} of {model.copies} copies"))
            elif not copies and model.waiting and model.oldest >= PATIENCE * model.load:
                found.append(
                    (-model.oldest, model, f"is nowhere, and {model.waiting} wait, up to {model.oldest:.1f} s")
                )
        found.sort(key=lambda due: (due[0], due[1].name))
        return [(model, reason) for _, model, reason in found]

    def _make_room(self, model: Demand, reason: str) -> None:
        takers = self._places.takers(model)
        if reason.startswith("pinned to "):
            takers = takers & {self._places.numbers[reason.removeprefix("pinned to ")]}
        chosen = self._least_missed(model, takers)
        # Of places on one node that are missed equally, the first.
        victim = None if chosen is None else self._victim(chosen, model, forced=True)
        if chosen is None or victim is None:
            self.notes[model.name] = f"{reason}; {self._hindrance(model)}"
            return
        self._exchange(model, chosen, victim, reason)

    def _least_missed(self, model: Demand, takers: set[int]) -> int | None:
        """The first node where making room for a model costs least."""
        if not takers:
            return None
        losses = [(0.0, room) for room in self._places.rooms]
        for alike in self._places.places:
            if self._may_go(alike, model, forced=True):
                losses.append((self._loss(alike, model), alike))
        losses.sort(key=itemgetter(0))
        found, least = None, 0.0
        for loss, alike in losses:
            if found is not None and loss > least:
                break
            for number in alike.hosts:
                if found is not None and number >= found:
                    break
                if number in takers and self._places.frees(number, model, alike.model):
                    found, least = number, loss
                    break
        return found

    def _hindrance(self, model: Demand) -> str:
        able = [host for host in self.hosts if model.name in host.held]
        if not able:
            return "no ready node has it on its disk"
        if all(host.memory and model.size > host.memory for host in able):
            return "no node has the memory for it"
        if all(host.name in self._places.moving for host in able):
            return "every node that has it is loading or draining already"
        return "all that stands where it could is pinned, needed in so many copies, or just loaded"

    # -- exchanges that are worth it

    def _best(self) -> _Best | None:
        """The exchange that saves callers most; of equal ones that of the first model, on the first node."""
        given = {alike.given for alike in (*self._places.rooms, *self._places.places)}
        asked: list[tuple[float, int, Demand, dict[int, float]]] = []
        least = min(0.0, self._ranked[0].base) if self._ranked else 0.0
        for number, model in enumerate(self.models.values()):
            if model.rate <= 0.0 and not model.waiting:
                continue
            gains = {slots: self.cost(model) - self.cost(model, slots) for slots in given}
            most = max(gains.values(), default=0.0)
            if most >= GAIN * least + WORTH:
                asked.append((-most, number, model, gains))
        asked.sort(key=lambda one: one[:2])
        best: _Best | None = None
        for most, number, model, gains in asked:
            if best is not None and -most - least < best.saves:
                break
            if self._places.takers(model):
                best = self._better(best, number, model, gains)
        return best

    def _better(self, best: _Best | None, order: int, model: Demand, gains: dict[int, float]) -> _Best | None:
        """The best exchange for a model, where it is better than that for others."""
        chosen: dict[int, str | None] = {}
        takers = self._places.takers(model)
        for saves, alike in self._worth(model, gains, -math.inf if best is None else best.saves):
            if best is not None and saves < best.saves:
                break
            for number in alike.hosts:
                if best is not None and saves == best.saves and (order, number) > (best.number, best.host):
                    break
                if number not in takers or not self._places.frees(number, model, alike.model):
                    continue
                if number not in chosen:
                    chosen[number] = self._victim(number, model, forced=False)
                if chosen[number] == alike.model:
                    best = _Best(saves, order, number, model, alike.model)
                    break
        return best

    def _worth(self, model: Demand, gains: dict[int, float], least: float) -> list[tuple[float, Alike]]:
        """What it saves, and the places whose going is worth it, where that is so much at least; the most first."""
        found = [(gains[room.given], room) for room in self._places.rooms if gains[room.given] >= max(WORTH, least)]
        most, callers = max(gains.values()), self._callers(model)
        for alike in self._ranked:
            if most < GAIN * alike.base + WORTH or most - alike.base < least:
                break
            gain, loss = gains[alike.given], alike.base + callers * alike.drain
            left = alike.lasts - model.load - alike.drain
            gain *= (left if left > 0.0 else 0.0) / alike.lasts
            if gain - loss >= least and gain >= GAIN * loss + WORTH and self._may_go(alike, model, forced=False):
                found.append((gain - loss, alike))
        found.sort(key=itemgetter(0), reverse=True)
        return found

    # -- who goes

    def _victim(self, number: int, model: Demand, forced: bool) -> str | None:
        """Who must go so that a model has room on a node that may take it; "" where there is room, None: nobody."""
        if self._places.fits(number, model):
            return ""
        best: str | None = None
        least = 0.0
        for alike in self._places.at[number]:
            if not self._may_go(alike, model, forced) or not self._places.fits(number, model, alike.model):
                continue
            loss = self._loss(alike, model)
            if best is None or loss < least:
                best, least = alike.model, loss
        return best

    def _loss(self, alike: Alike, model: Demand) -> float:
        return alike.base + self._callers(model) * alike.drain

    def _callers(self, model: Demand) -> float:
        # Who waits for the model waits for the drain too.
        return model.rate + model.waiting / PERIOD

    def _may_go(self, alike: Alike, model: Demand, forced: bool) -> bool:
        other = alike.demand
        if other is None:
            return True
        if alike.pinned:
            return False
        copies = self.copies.get(alike.model, 0)
        if copies <= other.copies:
            # Where not all have room that are to have a copy, those without one have as good a claim.
            equal = model.copies > 0 and not self.copies.get(model.name, 0) and model.waiting > 0
            if not (forced and equal and copies > 0 and self.overdue(model)):
                return False
        if other.waiting and copies <= 1 and other.oldest >= model.oldest:
            return False
        # A model that was just loaded serves those it was loaded for first.
        return alike.rested or (forced and ((not alike.in_use and not other.waiting) or self.overdue(model)))

    def _exchange(self, model: Demand, number: int, victim: str, reason: str) -> None:
        host = self.hosts[number]
        self._places.moves(number)
        if victim:
            stand = host.places[victim]
            self.slots[victim] -= stand.slots
            self.copies[victim] -= 1
            why = f"makes room for {model.name}: {reason}"
            self.steps.append(Step(Action.DRAIN, host.name, victim, why, model.name))
        else:
            self.steps.append(Step(Action.LOAD, host.name, model.name, reason))
        self._count(model.name, host.slots)
        self._judge({model.name, victim} if victim else {model.name})

    def _count(self, name: str, slots: int) -> None:
        self.slots[name] = self.slots.get(name, 0) + slots
        self.copies[name] = self.copies.get(name, 0) + 1
