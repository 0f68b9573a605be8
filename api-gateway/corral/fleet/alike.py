"""The places of a fleet for one plan of `corral.fleet.placement`: those that are alike are kept, and judged, as one.

A fleet of a thousand nodes has ten thousand places and a few hundred kinds of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from corral.fleet.slots import PlaceState

if TYPE_CHECKING:
    from corral.fleet.placement import Demand, Host, Stand

STAY = 4.0
"""A model stays for so many times its load at least, unless nobody uses it or another's oldest is
overdue."""


@dataclass(slots=True, eq=False)
class Alike:
    """Places that are alike to every decision, but for the rest of their nodes. ``hosts``: where, by number, in order.

    ``model`` is "" for nodes that may hold one model more, and ``demand`` is None where nobody asks for it. ``given``:
    slots that such a node gives to a model. ``rested``: they stand for so long that they may go (`STAY`). ``drain``:
    how long it takes at a guess until nothing runs there, the longest of those that do (seconds).
    """

    model: str
    given: int
    demand: Demand | None = None
    slots: int = 0
    in_use: int = 0
    rested: bool = True
    pinned: bool = False
    drain: float = 0.0
    hosts: list[int] = field(default_factory=list)
    base: float = 0.0
    """What the model's callers lose with one of them, besides the drain: the planner's word."""
    lasts: float = 0.0
    """For how long at a guess nobody misses it: the planner's word."""


class Places:
    """Resident places of those nodes that do nothing else. A node is called by its number in ``hosts``."""

    def __init__(self, hosts: Sequence[Host], models: Mapping[str, Demand], moving: set[str], now: float) -> None:
        self.hosts, self.models, self.moving, self.now = hosts, models, moving, now
        self.numbers = {host.name: number for number, host in enumerate(hosts)}
        self.rooms: list[Alike] = []
        """Nodes that may hold one model more; their memory is another question (`fits`)."""
        self.places: list[Alike] = []
        self.of: dict[str, list[Alike]] = {}
        """Places by model."""
        self.at: list[list[Alike]] = []
        """Those of each node, in its order."""
        self._used: list[int] = []
        self._open: dict[str, set[int]] = {}
        self._group()

    def takers(self, model: Demand) -> set[int]:
        """Nodes that could hold a model besides what they hold, or instead of it."""
        found = self._open.get(model.name)
        if found is None:
            name, size = model.name, model.size
            found = self._open[name] = {
                number
                for number, host in enumerate(self.hosts)
                if name in host.held
                and name not in host.places
                and host.name not in self.moving
                and (not host.memory or size <= host.memory)
            }
        return found

    def moves(self, number: int) -> None:
        """A node has something to do now, and begins nothing else."""
        self.moving.add(self.hosts[number].name)
        for takers in self._open.values():
            takers.discard(number)

    def fits(self, number: int, model: Demand, without: str = "") -> bool:
        """Whether a model has room on a node, once another one has gone."""
        host = self.hosts[number]
        if host.max_models and len(host.places) - bool(without) >= host.max_models:
            return False
        if not host.memory:
            return True
        gone = self.models[without].size if without in self.models else 0
        return self._used[number] - gone + model.size <= host.memory

    def frees(self, number: int, model: Demand, victim: str) -> bool:
        """Whether a model has room on a node if another one goes, and only then; "": if none does."""
        return self.fits(number, model, victim) and not (victim and self.fits(number, model))

    def _group(self) -> None:
        kinds: dict[tuple[object, ...], Alike] = {}
        rooms: dict[int, Alike] = {}
        for number, host in enumerate(self.hosts):
            at: list[Alike] = []
            self.at.append(at)
            sizes = [self.models[name].size for name in host.places if name in self.models] if host.memory else ()
            self._used.append(sum(sizes))
            if host.name in self.moving:
                continue
            if not host.max_models or len(host.places) < host.max_models:
                if host.slots not in rooms:
                    rooms[host.slots] = Alike("", host.slots)
                rooms[host.slots].hosts.append(number)
            for name, stand in host.places.items():
                if stand.state is not PlaceState.RESIDENT:
                    continue
                demand = self.models.get(name)
                rested = demand is None or self.now - stand.since >= STAY * demand.load
                pinned = demand is not None and host.name in demand.pins
                key = (name, stand.slots, stand.in_use, rested, pinned, host.slots)
                alike = kinds.get(key)
                if alike is None:
                    drain = _drain(stand, demand)
                    alike = Alike(name, host.slots, demand, stand.slots, stand.in_use, rested, pinned, drain)
                    kinds[key] = alike
                    self.of.setdefault(name, []).append(alike)
                alike.hosts.append(number)
                at.append(alike)
        self.rooms, self.places = list(rooms.values()), list(kinds.values())


def _drain(stand: Stand, model: Demand | None) -> float:
    if not stand.in_use or model is None:
        return 0.0
    return model.seconds * sum(1.0 / number for number in range(1, stand.in_use + 1))
