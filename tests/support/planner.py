"""The planner as its words say it: at each step it asks every node about every model, and every place about both.

`corral.fleet.placement` must decide the same, whatever it remembers and leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from corral.fleet.alike import STAY
from corral.fleet.demand import cost
from corral.fleet.placement import GAIN, OVERDUE, PATIENCE, PERIOD, WORTH, Action, Demand, Host, Stand, Step
from corral.fleet.slots import PlaceState

_COUNTED = (PlaceState.LOADING, PlaceState.RESIDENT)


class Plain:
    """Decides; a snapshot in, steps out. Nothing is remembered but what it counts within one call."""

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
        self._moving = {host.name for host in hosts if host.moves}
        for host in self.hosts:
            for name, stand in host.places.items():
                if stand.state in _COUNTED:
                    self._count(name, stand.slots)
            if host.coming and host.moves and host.coming not in host.places:
                self._count(host.coming, host.slots)

    def plan(self) -> list[Step]:
        """What is to be done now."""
        for host in self.hosts:
            for name, stand in host.places.items():
                if stand.state is PlaceState.DRAINING and not stand.in_use:
                    self.steps.append(Step(Action.UNLOAD, host.name, name, "nothing runs on it any more"))
        for model, least in self._due():
            self._make_room(model, least)
        while (best := self._best()) is not None:
            model, host, victim, gain = best
            self._exchange(model, host, victim, f"saves callers {gain:.2g} s of waiting a second")
        return self.steps

    @property
    def hurries(self) -> bool:
        """Whether the next look is to be soon, after `plan`: something leaves, or somebody waits for what is nowhere.

        Every load that room is made for is put off by two looks: one sees that nothing runs any more, one that the node
        is empty.
        """
        if any(step.action is not Action.LOAD for step in self.steps):
            return True
        if any(stand.state is PlaceState.DRAINING for host in self.hosts for stand in host.places.values()):
            return True
        return any(model.waiting and not self.copies.get(model.name) for model in self.models.values())

    def cost(self, model: Demand, more: int = 0) -> float:
        """What the model's callers wait with so many slots more."""
        slots = self.slots.get(model.name, 0) + more
        return cost(model.rate, model.waiting, model.seconds, model.load, slots)

    def overdue(self, model: Demand) -> bool:
        """Whether a model that is nowhere must have room now, or its oldest request is refused before it is there."""
        latest = max(PATIENCE * model.load, self._queue_wait - model.load)
        return model.oldest >= min(OVERDUE * model.load, latest)

    # -- models that get room whatever it costs others

    def _due(self) -> list[tuple[Demand, str]]:
        found: list[tuple[float, Demand, str]] = []
        for model in self.models.values():
            copies = self.copies.get(model.name, 0)
            for node in model.pins:
                host = next((host for host in self.hosts if host.name == node), None)
                if host is not None and model.name not in host.places:
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
        chosen: tuple[float, Host, str] | None = None
        pinned = reason.startswith("pinned to ")
        for host in self.hosts:
            if pinned and reason != f"pinned to {host.name}":
                continue
            victim = self._victim(host, model, forced=True)
            if victim is not None and (chosen is None or victim[1] < chosen[0]):
                chosen = victim[1], host, victim[0]
        if chosen is None:
            self.notes[model.name] = f"{reason}; {self._hindrance(model)}"
            return
        self._exchange(model, chosen[1], chosen[2], reason)

    def _hindrance(self, model: Demand) -> str:
        able = [host for host in self.hosts if model.name in host.held]
        if not able:
            return "no ready node has it on its disk"
        if all(host.memory and model.size > host.memory for host in able):
            return "no node has the memory for it"
        if all(host.name in self._moving for host in able):
            return "every node that has it is loading or draining already"
        return "all that stands where it could is pinned, needed in so many copies, or just loaded"

    # -- exchanges that are worth it

    def _best(self) -> tuple[Demand, Host, str, float] | None:
        best: tuple[Demand, Host, str, float] | None = None
        for model in self.models.values():
            if model.rate <= 0.0 and not model.waiting:
                continue
            for host in self.hosts:
                found = self._victim(host, model, forced=False)
                if found is None:
                    continue
                victim, loss = found
                gain = self.cost(model) - self.cost(model, host.slots)
                if victim:
                    # The last copy of a model comes back when that is next asked for.
                    lasts = PERIOD
                    if self.copies.get(victim, 0) <= 1 and victim in self.models:
                        lasts = min(PERIOD, 1.0 / max(1e-9, self.models[victim].rate))
                    gain *= max(0.0, lasts - model.load - self._drain(host, victim)) / lasts
                    if gain < GAIN * loss + WORTH:
                        continue
                elif gain < WORTH:
                    continue
                if best is None or gain - loss > best[3]:
                    best = model, host, victim, gain - loss
        return best

    def _victim(self, host: Host, model: Demand, forced: bool) -> tuple[str, float] | None:
        """(Who must go so that the model has room on a node, what that costs); "" where there is room, None: nobody."""
        if host.name in self._moving or model.name in host.places or model.name not in host.held:
            return None
        if host.memory and model.size > host.memory:
            return None
        if self._fits(host, model, ""):
            return "", 0.0
        best: tuple[str, float] | None = None
        for name, stand in host.places.items():
            if not self._may_go(host, name, stand, model, forced):
                continue
            other = self.models.get(name)
            loss = 0.0
            if other is not None:
                loss = self.cost(other, -stand.slots) - self.cost(other)
                # Who waits for the model waits for the drain too.
                loss += (model.rate + model.waiting / PERIOD) * self._drain(host, name)
            if best is None or loss < best[1]:
                best = name, loss
        return best

    def _may_go(self, host: Host, name: str, stand: Stand, model: Demand, forced: bool) -> bool:
        if stand.state is not PlaceState.RESIDENT or not self._fits(host, model, name):
            return False
        other = self.models.get(name)
        if other is None:
            return True
        if host.name in other.pins:
            return False
        if self.copies.get(name, 0) <= other.copies:
            # Where not all have room that are to have a copy, those without one have as good a claim.
            equal = model.copies > 0 and not self.copies.get(model.name, 0) and model.waiting > 0
            if not (forced and equal and self.copies.get(name, 0) > 0 and self.overdue(model)):
                return False
        if other.waiting and self.copies.get(name, 0) <= 1 and other.oldest >= model.oldest:
            return False
        # A model that was just loaded serves those it was loaded for first.
        if self.now - stand.since >= STAY * other.load:
            return True
        return forced and ((not stand.in_use and not other.waiting) or self.overdue(model))

    def _fits(self, host: Host, model: Demand, without: str) -> bool:
        stands = [name for name in host.places if name != without]
        if host.max_models and len(stands) >= host.max_models:
            return False
        if not host.memory:
            return True
        sizes = [self.models[name].size for name in stands if name in self.models]
        return sum(sizes) + model.size <= host.memory

    def _drain(self, host: Host, name: str) -> float:
        """How long it takes at a guess until nothing runs there: the longest of those that do."""
        stand, model = host.places[name], self.models.get(name)
        if not stand.in_use or model is None:
            return 0.0
        return model.seconds * sum(1.0 / number for number in range(1, stand.in_use + 1))

    def _exchange(self, model: Demand, host: Host, victim: str, reason: str) -> None:
        self._moving.add(host.name)
        if victim:
            stand = host.places[victim]
            self.slots[victim] -= stand.slots
            self.copies[victim] -= 1
            why = f"makes room for {model.name}: {reason}"
            self.steps.append(Step(Action.DRAIN, host.name, victim, why, model.name))
        else:
            self.steps.append(Step(Action.LOAD, host.name, model.name, reason))
        self._count(model.name, host.slots)

    def _count(self, name: str, slots: int) -> None:
        self.slots[name] = self.slots.get(name, 0) + slots
        self.copies[name] = self.copies.get(name, 0) + 1
