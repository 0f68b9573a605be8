"""The leader's hand in what stands where: sees the nodes and the store, lets `corral.fleet.placement` decide, does it.

Ollama's own word is what counts: a model is resident once `/api/ps` has it, and absent once it has it no more. What
the gateways may use stands in the store, with a generation that grows with the leader's term, so that one that was
deposed changes nothing there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import hiredis

from corral.control.ollama import NodeFailed, Ollama
from corral.control.prober import Member
from corral.fleet.demand import Mean, Rate
from corral.fleet.placement import Action, Demand, Host, Planner, Stand, Step
from corral.fleet.slots import PlaceState, step_of
from corral.store.demand import Seen, generation, read
from corral.store.slots import Slots
from corral.store.valkey import Valkey, ValkeyDown

LOAD = 10.0
"""How long a load is thought to take (seconds) until one was measured."""
SECONDS = 4.0
REASONS = 20
BACKOFF = 30.0
"""How long a node is left alone with a model that it failed to load (seconds)."""
UNLOADED = 0.2
FRESH = 3.0
"""For so long after a load or an unload, what is known of a node may be what a probe found before it (seconds)."""
ABSENT, LOADING, RESIDENT, DRAINING = PlaceState.ABSENT, PlaceState.LOADING, PlaceState.RESIDENT, PlaceState.DRAINING

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Spot:
    """A model on a node as the leader has it; ``told``: the store has heard."""

    state: PlaceState
    since: float
    generation: int = 0
    told: bool = False


@dataclass(slots=True)
class Known:
    """What is known of a model: arrivals, busy slots, load times, since when requests wait, decisions and why."""

    rate: Rate
    busy: Mean
    load: Mean
    asked: int
    waits_since: float | None = None
    reasons: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=REASONS))


class Placement:
    """Keeps the places of a fleet. ``options`` are those with which a model is loaded; ``catalogue`` says of a model
    its size (bytes), least copies and pins as a `Demand`. ``term`` grows from one leader to the next. Times are
    monotonic seconds."""

    def __init__(
        self,
        store: Valkey,
        node: Callable[[Member], Ollama],
        options: Callable[[str], dict[str, Any]],
        catalogue: Callable[[str], Demand] = Demand,
        term: int = 0,
    ) -> None:
        self._store = store
        self._term = term
        self._slots = Slots(store, Valkey("redis://unused"), "leader")
        self._node, self._options, self._catalogue = node, options, catalogue
        self.spots: dict[tuple[str, str], Spot] = {}
        self.known: dict[str, Known] = {}
        self._coming: dict[str, str] = {}
        self._failed: dict[tuple[str, str], float] = {}
        self._fresh: dict[tuple[str, str], float] = {}
        self._work: dict[tuple[str, str], asyncio.Task[None]] = {}

    def why(self, model: str) -> list[tuple[float, str]]:
        """The last decisions about a model and the times of them, the newest last."""
        known = self.known.get(model)
        return list(known.reasons) if known is not None else []

    async def tick(self, members: Iterable[Member], now: float) -> list[Step]:
        """Look, decide and begin what was decided.

        Raises:
            ValkeyDown, hiredis.ReplyError: the store cannot be asked; nothing was decided.
        """
        members = list(members)
        held = {entry["name"] for member in members for entry in member.usable}
        seen = await read(self._store, held)
        for member in members:
            self.look(member, seen, now)
        names = {member.name for member in members}
        for node, model in self.spots:
            if node not in names:
                self._set(node, model, ABSENT, now)
        await self._tell(members, seen)
        demands = {model: self._demand(model, one, now) for model, one in seen.items()}
        hosts = [self._host(member, seen, now) for member in members]
        planner = Planner(hosts, demands, now)
        steps = planner.plan()
        by_name = {member.name: member for member in members}
        for step in steps:
            self._begin(by_name[step.node], step, now)
        for model, note in planner.notes.items():
            self._note(model, now, f"waits: {note}")
        await self._tell(members, seen)
        return steps

    async def close(self) -> None:
        """End what is under way."""
        for task in self._work.values():
            task.cancel()
        await asyncio.gather(*self._work.values(), return_exceptions=True)

    # -- what is

    def look(self, member: Member, seen: dict[str, Seen], now: float) -> None:
        """Bring the places of a node to what it says, and to what an earlier leader had begun."""
        self._fresh = {place: until for place, until in self._fresh.items() if until > now}
        present = set(member.resident) if member.up else set()
        for model in present:
            if (member.name, model) in self._fresh:
                continue
            spot = self.spots.get((member.name, model))
            if spot is None:
                word = seen[model].places.get(member.name) if model in seen else None
                state = DRAINING if word is not None and word[0] == DRAINING else RESIDENT
                self.spots[member.name, model] = Spot(state, now)
            elif spot.state is LOADING and (member.name, model) not in self._work:
                self._set(member.name, model, RESIDENT, now)
        for (node, model), spot in self.spots.items():
            gone = node == member.name and model not in present and (node, model) not in self._work
            if gone and (node, model) not in self._fresh and spot.state is not ABSENT:
                self._set(node, model, ABSENT, now)
                if spot.state is RESIDENT:
                    self._note(model, now, f"{node} has it no more")

    async def _tell(self, members: list[Member], seen: dict[str, Seen]) -> None:
        """Tell the store what it does not know: what changed, and everything where it has forgotten."""
        slots = {member.name: member.slots for member in members}
        for (node, model), spot in list(self.spots.items()):
            if node not in slots and spot.state is not ABSENT:
                continue
            word = seen[model].places.get(node) if model in seen else None
            if spot.told and (word is not None or spot.state is ABSENT):
                continue
            spot.generation = await generation(self._store, self._term)
            count = slots.get(node, 1)
            await self._slots.place(node, model, spot.state, spot.generation, count, step_of(count, 0, 0))
            spot.told = True
            if spot.state is ABSENT:
                del self.spots[node, model]

    def _demand(self, model: str, seen: Seen, now: float) -> Demand:
        known = self.known.get(model)
        if known is None:
            known = self.known[model] = Known(Rate(now), Mean(0.0), Mean(LOAD, 0.3), seen.asked)
        known.rate.note(now, max(0, seen.asked - known.asked))
        known.asked = seen.asked
        known.busy.note(float(sum(seen.used.values())))
        known.waits_since = (known.waits_since or now) if seen.waiting else None
        demand = self._catalogue(model)
        demand.rate, demand.waiting = known.rate.value(now), seen.waiting
        demand.oldest = now - known.waits_since if known.waits_since is not None else 0.0
        # Little's law: so many run at once as come in the time that one takes.
        demand.seconds = min(600.0, max(0.1, known.busy.value / demand.rate)) if demand.rate > 0.001 else SECONDS
        demand.load = known.load.value
        return demand

    def _host(self, member: Member, seen: dict[str, Seen], now: float) -> Host:
        held = {entry["name"] for entry in member.usable}
        held -= {model for (node, model), until in self._failed.items() if node == member.name and until > now}
        host = Host(
            member.name,
            member.state == "ready",
            member.memory or 0,
            member.max_models or 0,
            member.slots,
            frozenset(held),
            coming=self._coming.get(member.name, ""),
        )
        for (node, model), spot in self.spots.items():
            if node == member.name and spot.state is not ABSENT:
                used = seen[model].used.get(node, 0) if model in seen else 0
                host.places[model] = Stand(spot.state, spot.since, used, member.slots)
        return host

    # -- what is done

    def _begin(self, member: Member, step: Step, now: float) -> None:
        self._note(step.model, now, f"{step.action} on {member.name}: {step.reason}")
        place = member.name, step.model
        if step.action is Action.DRAIN:
            self._coming[member.name] = step.wanted
            self._set(*place, DRAINING, now)
            self._note(step.wanted, now, f"{member.name} makes room: {step.model} drains")
        elif place not in self._work:
            if step.action is Action.LOAD:
                self._coming.pop(member.name, None)
                self._set(*place, LOADING, now)
                work = self._load(member, step.model)
            else:
                work = self._unload(member, step.model)
            self._work[place] = asyncio.create_task(work)

    async def _load(self, member: Member, model: str) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with member.loads:
                await self._node(member).load(model, self._options(model))
            self.known[model].load.note(loop.time() - began)
            self.finished(member.name, model, RESIDENT, loop.time())
            await self._tell([member], {})
        except NodeFailed as error:
            self._failed[member.name, model] = loop.time() + BACKOFF
            self._note(model, loop.time(), f"{member.name} could not load it: {error}")
            self._set(member.name, model, ABSENT, loop.time())
        except (ValkeyDown, hiredis.ReplyError) as error:
            log.warning("the store did not hear that %s is on %s: %s", model, member.name, error)
        finally:
            del self._work[member.name, model]

    async def _unload(self, member: Member, model: str) -> None:
        node = self._node(member)
        try:
            async with member.loads:
                await node.unload(model)
                while await node.resident(model):  # noqa: ASYNC110
                    await asyncio.sleep(UNLOADED)
            self.finished(member.name, model, ABSENT, asyncio.get_running_loop().time())
        except NodeFailed as error:
            self._note(model, asyncio.get_running_loop().time(), f"{member.name} could not unload it: {error}")
        finally:
            del self._work[member.name, model]

    def finished(self, node: str, model: str, state: PlaceState, now: float) -> None:
        """A load or an unload is done."""
        self._set(node, model, state, now)
        self._fresh[node, model] = now + FRESH

    def _set(self, node: str, model: str, state: PlaceState, now: float) -> None:
        spot = self.spots.get((node, model))
        if spot is None:
            self.spots[node, model] = Spot(state, now)
        elif spot.state is not state:
            spot.state, spot.since, spot.told = state, now, False

    def _note(self, model: str, now: float, text: str) -> None:
        known = self.known.get(model)
        if known is not None and (not known.reasons or known.reasons[-1][1] != text):
            known.reasons.append((now, text))
