"""The leader's hand in what stands where: sees the nodes and the store, lets `corral.fleet.placement` decide, does it.

Ollama's own word is what counts: a model is resident once `/api/ps` has it, and absent once it has it no more. What
the gateways may use stands in the store, with a generation that grows with the leader's term, so that one that was
deposed changes nothing there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import hiredis

from corral.control.known import Known, Rebuilt
from corral.control.ollama import NodeFailed, Ollama
from corral.control.prober import Member
from corral.fleet.demand import Rate
from corral.fleet.dispatch import Speeds
from corral.fleet.placement import Action, Demand, Host, Planner, Stand, Step
from corral.fleet.pools import counted, model_of
from corral.fleet.slots import PlaceState, step_of
from corral.store.demand import Seen, generation, read
from corral.store.keeper import Deposed, fence, place
from corral.store.lua import PREFIX
from corral.store.slots import GRANTS
from corral.store.valkey import Valkey, ValkeyDown

BACKOFF = 30.0
"""How long a node is left alone with a model that it failed to load (seconds)."""
UNLOADED = 0.2
UNLOAD = 60.0
"""How long an unload may take (seconds); then it is tried again."""
RESTING = "resting"
"""What the store hears of a model that is in the memory of a node that gets no work now."""
FASTER = 0.2
"""A node's speed is told again once it has changed by this share."""
FRESH = 3.0
"""For so long after a load or an unload, what is known of a node may be what a probe found before it (seconds)."""
ABSENT, LOADING, RESIDENT, DRAINING = PlaceState.ABSENT, PlaceState.LOADING, PlaceState.RESIDENT, PlaceState.DRAINING

BEFORE = {Action.LOAD: ABSENT, Action.DRAIN: RESIDENT, Action.UNLOAD: DRAINING}
"""The state in which a place is when a step is decided, and must still be when it is begun."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Spot:
    """A model on a node as the leader has it; ``told`` is what the store has heard of it last, "" that it must hear.

    ``step`` is what a request adds to its load, as the store has heard (`step_of`).
    """

    state: PlaceState
    since: float
    generation: int = 0
    told: str = ""
    step: float = 0.0


class Placement:
    """Keeps the places of a fleet. ``options`` are those with which a model is loaded; ``catalogue`` says of a model
    its size (bytes), least copies and pins as a `Demand`. ``term`` grows from one leader to the next, ``groups`` are
    those of nodes (`corral.fleet.pools`), ``speeds`` what was measured of them. ``queue_wait`` is how long a request
    waits at least (seconds); ``working`` whether an operation is at work on models, such as the catalogue's: copies
    that are missing are left to it. ``hurries``: the next `tick` is to be soon. Within, a model is called as its slots
    are counted: by node or group. Times are monotonic seconds."""

    def __init__(
        self,
        store: Valkey,
        node: Callable[[Member], Ollama],
        options: Callable[[str], dict[str, Any]],
        catalogue: Callable[[str], Demand] = Demand,
        term: int = 0,
        groups: Mapping[str, str] | None = None,
        speeds: Speeds | None = None,
        queue_wait: float = 30.0,
        working: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._queue_wait, self._working = queue_wait, working
        self._number = 0
        self.term = term
        self.hurries = False
        self._groups = groups or {}
        self._speeds = speeds or Speeds()
        self._node, self._options, self._catalogue = node, options, catalogue
        self.spots: dict[tuple[str, str], Spot] = {}
        self.known: dict[str, Known] = {}
        self._coming: dict[str, str] = {}
        self._failed: dict[tuple[str, str], float] = {}
        self._fresh: dict[tuple[str, str], float] = {}
        self._work: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._closed = False
        self._learned: dict[str, int] = {}
        self._loads: dict[str, bytes] = {}
        self._rebuilt = Rebuilt()

    def why(self, model: str) -> list[tuple[float, str]]:
        """The last decisions about a model and the times of them, the newest first; of one look at the fleet, what is
        done before what waits."""
        pools = (known for name, known in self.known.items() if model_of(name) == model)
        found = [reason for known in pools for reason in reversed(known.reasons)]
        return sorted(found, key=lambda reason: -reason[0])

    def about(self, model: str, now: float) -> dict[str, Any]:
        """Where a model stands, how long its oldest request has waited, and the last decisions; ages in seconds."""
        places = [
            {"node": node, "state": spot.state, "seconds": round(now - spot.since, 1)}
            for (node, name), spot in sorted(self.spots.items())
            if model_of(name) == model and spot.state is not ABSENT
        ]
        waits = [known.waits_since for name, known in self.known.items() if model_of(name) == model]
        oldest = min([since for since in waits if since is not None], default=None)
        return {
            "places": places,
            "waits": None if oldest is None else round(now - oldest, 1),
            "decisions": [{"ago": round(now - at, 1), "what": text} for at, text in self.why(model)],
        }

    async def tick(self, members: Iterable[Member], now: float) -> list[Step]:
        """Look, decide and begin what was decided; nothing by a store that was flushed and has yet to hear what runs.

        Raises:
            ValkeyDown, hiredis.ReplyError: the store cannot be asked; nothing was decided.
        """
        members = list(members)
        held = {member.name: self._held(member) for member in members}
        granted = await self._store.request(b"GET", GRANTS)
        seen = await read(self._store, set().union(*held.values()))
        whole = self._rebuilt.whole(granted, await self._store.request(b"GET", GRANTS), now)
        self.look(members, seen, now)
        for node, model in self.spots:
            if node not in held:
                self._set(node, model, ABSENT, now)
        self._unknown(seen, now)
        await self._tell(members, seen)
        if not whole:
            return []
        ready = [(member, held[member.name]) for member in members if member.state == "ready"]
        standing: dict[str, list[str]] = {}
        for (node, model), spot in self.spots.items():
            if spot.state is RESIDENT:
                standing.setdefault(model, []).append(node)
        demands = {model: self._demand(model, one, ready, standing.get(model, []), now) for model, one in seen.items()}
        await self._tell_loads()
        self._failed = {spot: until for spot, until in self._failed.items() if until > now}
        spots = self._by_node()
        hosts = [self._host(member, held[member.name], spots.get(member.name, {}), seen) for member in members]
        steps = await self._decide(hosts, demands, now)
        by_name = {member.name: member for member in members}
        for step in steps:
            self._begin(by_name[step.node], step, now)
        await self._tell(members, {})
        return steps

    async def _decide(self, hosts: list[Host], demands: dict[str, Demand], now: float) -> list[Step]:
        def decide() -> Planner:
            planner = Planner(hosts, demands, now, self._queue_wait)
            planner.plan()
            return planner

        # Beside the event loop, which answers gateways meanwhile; and others end what they had begun.
        planner = await asyncio.to_thread(decide)
        if self._closed:
            return []
        self.hurries = planner.hurries
        for model, note in planner.notes.items():
            self._note(model, now, f"waits: {note}")
        return [step for step in planner.steps if self._state(step.node, step.model) is BEFORE[step.action]]

    async def close(self) -> None:
        """End what is under way, and begin nothing more."""
        self._closed = True
        for task in self._work.values():
            task.cancel()
        await asyncio.gather(*self._work.values(), return_exceptions=True)

    # -- what is

    def _name(self, member: Member, model: str) -> str:
        return counted(model, self._groups.get(member.name, ""))

    def _held(self, member: Member) -> set[str]:
        return {self._name(member, entry["name"]) for entry in member.usable}

    def _by_node(self) -> dict[str, dict[str, Spot]]:
        found: dict[str, dict[str, Spot]] = {}
        for (node, model), spot in self.spots.items():
            found.setdefault(node, {})[model] = spot
        return found

    def look(self, members: Iterable[Member], seen: dict[str, Seen], now: float) -> None:
        """Bring the places of nodes to what these say, and to what an earlier leader had begun."""
        self._fresh = {spot: until for spot, until in self._fresh.items() if until > now}
        spots = self._by_node()
        for member in members:
            self._look(member, spots.get(member.name, {}), seen, now)

    def _look(self, member: Member, spots: dict[str, Spot], seen: dict[str, Seen], now: float) -> None:
        loaded = {self._name(member, model) for model in member.resident} if member.up else set()
        present = loaded - {self._name(member, entry["name"]) for entry in member.removed}
        for model in present:
            if (member.name, model) in self._fresh:
                continue
            spot = spots.get(model)
            if spot is None:
                word = seen[model].places.get(member.name) if model in seen else None
                state = DRAINING if word is not None and word[0] == DRAINING else RESIDENT
                self.spots[member.name, model] = Spot(state, now)
            elif spot.state is LOADING and (member.name, model) not in self._work:
                self._set(member.name, model, RESIDENT, now)
        for model, spot in spots.items():
            where = member.name, model
            if model in present or where in self._work or where in self._fresh or spot.state is ABSENT:
                continue
            stood = spot.state is RESIDENT
            self._set(*where, ABSENT, now)
            if stood:
                self._note(model, now, f"{member.name} has it no more")
                if model not in loaded:
                    self._learn(member, present)

    def _learn(self, member: Member, present: set[str]) -> None:
        # A model went while another one came: the node has no room for more than stand there now.
        came = any(node == member.name for node, _ in (*self._work, *self._fresh))
        if came and present and member.up and not member.max_models:
            self._learned[member.name] = len(present | {model for node, model in self._work if node == member.name})

    async def _tell_loads(self) -> None:
        """Tell how long loads take: so long a request may have to wait for a model that is nowhere."""
        for model, known in self.known.items():
            load = b"%d" % (known.load.value * 1e6)
            if self._loads.get(model) != load:
                await self._store.request(b"HSET", PREFIX + b"loads", model.encode(), load)
                self._loads[model] = load

    async def _tell(self, members: list[Member], seen: dict[str, Seen]) -> None:
        """Tell the store what it does not know: what changed, and everything where it has forgotten."""
        slots = {member.name: member.slots for member in members}
        resting = {member.name for member in members if member.state != "ready"}
        fastest = self._speeds.best()
        for (node, model), spot in list(self.spots.items()):
            if node not in slots and spot.state is not ABSENT:
                continue
            word = seen[model].places.get(node) if model in seen else None
            state = RESTING if node in resting and spot.state is RESIDENT else str(spot.state)
            if not seen and spot.told == state:
                continue
            count = slots.get(node, 1)
            name = model_of(model)
            step = step_of(count, self._speeds.of(node, name), fastest.get(name, 0.0))
            same = spot.told == state and (state != RESIDENT or abs(step - spot.step) <= FASTER * spot.step)
            if same and (not seen or (word is not None and word[0] == state)):
                continue
            if same and word is None:
                self._loads.clear()  # the store has forgotten
            # Its counter begins anew in a store that was flushed; what is under way there must not be later than this.
            self._number = max(self._number + 1, await generation(self._store, self.term))
            spot.generation = self._number
            if not await place(self._store, node, model, state, spot.generation, count, step):
                spot.told = ""  # a later leader has spoken; if there is none, the next turn says it again
                log.warning("the store has a later word on %s on %s than that it is %s", model, node, state)
                continue
            spot.told, spot.step = state, step
            if spot.state is ABSENT:
                del self.spots[node, model]

    def _unknown(self, seen: dict[str, Seen], now: float) -> None:
        """Find what may be used as the store has it and does not stand: gateways said it while nobody led."""
        for model, one in seen.items():
            for node, (state, _) in one.places.items():
                if state == RESIDENT and (node, model) not in self.spots:
                    self.spots[node, model] = Spot(ABSENT, now)

    def _demand(
        self, model: str, seen: Seen, ready: list[tuple[Member, set[str]]], standing: list[str], now: float
    ) -> Demand:
        known = self.known.get(model)
        if known is None:
            known = self.known[model] = Known(Rate(now), seen.asked)
        known.look(seen, now)
        name = model_of(model)
        demand = self._catalogue(name)
        demand.name = model
        able = 0
        if demand.copies:
            able = sum(model in held and name not in member.released for member, held in ready)
        demand.copies = known.copies(demand.copies, len(standing), able, self._working(), now)
        if demand.pins:
            demand.pins = frozenset(standing)
        known.tell(demand, seen.waiting, now)
        return demand

    def _host(self, member: Member, held: set[str], spots: dict[str, Spot], seen: dict[str, Seen]) -> Host:
        if self._failed:
            held = {model for model in held if (member.name, model) not in self._failed}
        memory, places = member.memory or 0, member.max_models or 0
        if removed := member.removed:  # it takes room that nothing gives back
            memory = memory and max(1, memory - sum(entry.get("size", 0) for entry in removed))
            places = places and max(1, places - len(removed))
        host = Host(
            member.name,
            # What stands on one that does not answer, though it is not put out of use, spares nobody a load elsewhere.
            member.state == "ready" and member.answers,
            memory,
            places or self._learned.get(member.name, 0),
            member.slots,
            frozenset(held),
            coming=self._coming.get(member.name, ""),
        )
        for model, spot in spots.items():
            if spot.state is not ABSENT:
                used = seen[model].used.get(member.name, 0) if model in seen else 0
                host.places[model] = Stand(spot.state, spot.since, used, member.slots)
        return host

    # -- what is done

    def _begin(self, member: Member, step: Step, now: float) -> None:
        self._note(step.model, now, f"{step.action} on {member.name}: {step.reason}")
        spot = member.name, step.model
        if step.action is Action.DRAIN:
            self._coming[member.name] = step.wanted
            self._set(*spot, DRAINING, now)
            self._note(step.wanted, now, f"{member.name} makes room: {step.model} drains")
        elif spot not in self._work:
            if step.action is Action.LOAD:
                self._coming.pop(member.name, None)
                self._set(*spot, LOADING, now)
                work = self._load(member, step.model)
            else:
                work = self._unload(member, step.model)
            self._work[spot] = asyncio.create_task(work)

    async def _load(self, member: Member, model: str) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with member.loads:
                await fence(self._store, self.term)
                with member.measured.loads_now(model_of(model), self.known[model].load.value):
                    await self._node(member).load(model_of(model), self._options(model_of(model)))
            self.known[model].load.note(loop.time() - began)
            member.measured.loaded(model_of(model), loop.time() - began)
            self.finished(member.name, model, RESIDENT, loop.time())
            await self._tell([member], {})
        except NodeFailed as error:
            self._failed[member.name, model] = loop.time() + BACKOFF
            self._note(model, loop.time(), f"{member.name} could not load it: {error}")
            self._set(member.name, model, ABSENT, loop.time())
        except (Deposed, ValkeyDown, hiredis.ReplyError) as error:
            log.warning("%s on %s: its load goes no further: %s", model, member.name, error)
        finally:
            del self._work[member.name, model]

    async def _unload(self, member: Member, model: str) -> None:
        node = self._node(member)
        try:
            # It drains until then, and is tried again: nothing else begins on the node meanwhile.
            async with asyncio.timeout(UNLOAD), member.loads:
                await fence(self._store, self.term)
                await node.unload(model_of(model))
                while await node.resident(model_of(model)):  # noqa: ASYNC110
                    await asyncio.sleep(UNLOADED)
            self.finished(member.name, model, ABSENT, asyncio.get_running_loop().time())
        except NodeFailed as error:
            self._note(model, asyncio.get_running_loop().time(), f"{member.name} could not unload it: {error}")
        except TimeoutError:
            self._note(model, asyncio.get_running_loop().time(), f"{member.name} did not unload it in {UNLOAD:g} s")
        except (Deposed, ValkeyDown, hiredis.ReplyError) as error:
            log.warning("%s on %s: its unload goes no further: %s", model, member.name, error)
        finally:
            del self._work[member.name, model]

    def finished(self, node: str, model: str, state: PlaceState, now: float) -> None:
        """A load or an unload is done."""
        self._set(node, model, state, now)
        self._fresh[node, model] = now + FRESH

    def _state(self, node: str, model: str) -> PlaceState:
        spot = self.spots.get((node, model))
        return ABSENT if spot is None else spot.state

    def _set(self, node: str, model: str, state: PlaceState, now: float) -> None:
        spot = self.spots.get((node, model))
        if spot is None:
            self.spots[node, model] = Spot(state, now)
        elif spot.state is not state:
            spot.state, spot.since, spot.told = state, now, ""

    def _note(self, model: str, now: float, text: str) -> None:
        known = self.known.get(model)
        if known is not None:
            known.note(now, text)
