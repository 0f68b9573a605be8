"""What the catalogue asks of the fleet, and the steps from what the nodes hold to that."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from corral.fleet.node import canonical_name

OWN = "corral-"
"""Namespaces of the names that Corral itself gives: no caller sees a model under them."""

PULL, COPY, LOAD, UNLOAD, REMOVE = "pull", "copy", "load", "unload", "remove"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model of the catalogue. ``digest`` is that of corral.yaml (``stated``) or the recorded one; None: not known."""

    name: str
    digest: str | None = None
    stated: bool = False
    copies: int = 1
    pin: bool = False
    num_ctx: int | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """A model on a node's disk; ``size`` in bytes."""

    digest: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in a node's memory. ``lasting``: until it is unloaded, not for a while only."""

    digest: str
    size: int = 0
    context: int | None = None
    lasting: bool = True


@dataclass(frozen=True, slots=True)
class Holdings:
    """A node: what it holds by canonical name, and its room. ``problem``: why nothing can be done there now."""

    node: str
    held: Mapping[str, Held] = field(default_factory=dict)
    resident: Mapping[str, Resident] = field(default_factory=dict)
    max_models: int | None = None
    memory: int | None = None
    problem: str | None = None
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do on one node. ``source``: the name that a copy is made of; ``room_for``: why it is unloaded."""

    action: str
    node: str
    model: str
    reason: str = ""
    digest: str | None = None
    source: str | None = None
    room_for: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """``steps`` in the order of each node; ``problems`` keep the catalogue from being in force, ``notes`` do not."""

    steps: tuple[Step, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Names these steps: another plan has another."""
        return hashlib.sha256(repr(self.steps).encode()).hexdigest()[:12]


@dataclass(slots=True)
class _Place:
    """A node while residency is decided: sizes of what stays by name, and of what may be unloaded for it."""

    node: Holdings
    secured: dict[str, int] = field(default_factory=dict)
    loose: dict[str, int] = field(default_factory=dict)

    def evicted_for(self, size: int) -> list[str] | None:
        """What has to be unloaded for a model of ``size`` bytes; None: there is no room even so."""
        count, memory = self.node.max_models, self.node.memory
        kept = sum(self.secured.values()) + size
        if (count is not None and len(self.secured) + 1 > count) or (memory is not None and kept > memory):
            return None
        evicted, loose = [], dict(self.loose)
        while loose and (
            (count is not None and len(self.secured) + 1 + len(loose) > count)
            or (memory is not None and kept + sum(loose.values()) > memory)
        ):
            largest = max(sorted(loose), key=loose.__getitem__)
            evicted.append(largest)
            del loose[largest]
        return evicted

    def room(self) -> str:
        """Its room, for people."""
        parts = [] if self.node.max_models is None else [f"max_models {self.node.max_models}"]
        parts += [] if self.node.memory is None else [f"memory {self.node.memory / (1 << 30):.1f} GiB"]
        return f"{self.node.node} ({', '.join(parts)}) keeps {', '.join(sorted(self.secured)) or 'nothing'}"


def plan(wanted: Iterable[Wanted], nodes: Sequence[Holdings], everywhere: bool = False) -> Plan:
    """Every node holds every model, and as many nodes as a model has ``copies`` keep it resident.

    ``everywhere``: all nodes keep it, as far as they have room; too little room is a problem only below ``copies``.
    Pinned models choose first, then those that come first in the catalogue.
    """
    wanted = list(wanted)
    usable = [node for node in nodes if node.problem is None and not node.draining]
    names = ", ".join(model.name for model in wanted)
    away = [node for node in nodes if node.problem is not None and not node.draining] if wanted else []
    problems = [f"{node.node}: {names}: the node {node.problem}" for node in away]
    notes = [f"{node.node} is draining: it is left as it is" for node in nodes if node.draining]
    if usable:
        few = [model for model in wanted if model.copies > len(usable)]
        notes += [f"{model.name}: {model.copies} copies asked for, {len(usable)} in service" for model in few]
    fetch = [step for node in usable for model in wanted if (step := fetched(model, node)) is not None]
    loads, missing = _residency(wanted, usable, everywhere)
    if wanted and not usable and not problems:
        problems.append("no node is in service")
    steps = [step for node in usable for step in _in_order(node.node, fetch, loads)]
    return Plan(tuple(steps), (*problems, *missing), tuple(notes))


def _in_order(node: str, fetch: Iterable[Step], loads: Iterable[Step]) -> list[Step]:
    """A node's steps: what can be loaded at once does not wait for a download."""
    fetch = [step for step in fetch if step.node == node]
    late = {step.model for step in fetch}
    loads = [step for step in loads if step.node == node]
    at_once = [step for step in loads if not {step.model, step.room_for} & late]
    return [*at_once, *fetch, *(step for step in loads if step not in at_once)]


def fetched(model: Wanted, node: Holdings) -> Step | None:
    """How a node comes by a model's right version; None where it has it."""
    held = node.held.get(model.name)
    if held is not None and (model.digest is None or held.digest == model.digest):
        return None
    reason = "not held" if held is None else differs(model, held.digest)
    if model.digest is not None:
        for name in sorted(node.held):
            if node.held[name].digest == model.digest:
                return Step(COPY, node.node, model.name, f"{reason}; held as {name}", model.digest, name)
    return Step(PULL, node.node, model.name, reason, model.digest)


def differs(model: Wanted, digest: str) -> str:
    """That a node holds another version, for people."""
    where = "catalogue" if model.stated else "recorded"
    return f"digest differs: {where} {model.digest}, held {digest}"


def settled(name: str, nodes: Iterable[Holdings]) -> tuple[str, str] | None:
    """The digest to record for a model that has none, and a node with it: what most nodes hold, then the first."""
    found: dict[str, list[str]] = {}
    for node in nodes:
        if node.problem is None and name in node.held:
            found.setdefault(node.held[name].digest, []).append(node.node)
    if not found:
        return None
    digest = max(found, key=lambda one: len(found[one]))
    return digest, found[digest][0]


def _residency(wanted: Sequence[Wanted], nodes: Sequence[Holdings], everywhere: bool) -> tuple[list[Step], list[str]]:
    places = [_Place(node, loose={name: one.size for name, one in node.resident.items()}) for node in nodes]
    steps: list[Step] = []
    problems: list[str] = []
    order = sorted(wanted, key=lambda model: not model.pin)
    counts = {model.name: len(nodes) if everywhere else min(model.copies, len(nodes)) for model in order}
    has: dict[str, int] = {}
    # What is in memory stays there: as it should be first, then what has to be loaded anew.
    for model in order:
        there = [place for place in places if model.name in place.node.resident]
        there.sort(key=lambda place: _amiss(model, place.node) is not None)
        for number, place in enumerate(there):
            if number >= counts[model.name] and not model.pin:
                break
            place.secured[model.name] = place.loose.pop(model.name)
            has[model.name] = has.get(model.name, 0) + 1
            if number < counts[model.name] and (why := _amiss(model, place.node)) is not None:
                steps.append(Step(LOAD, place.node.node, model.name, why, model.digest))
    for model in order:
        size = _size(model.name, nodes)
        while has.get(model.name, 0) < counts[model.name]:
            free = [(place, out) for place in places if model.name not in place.secured
                    and (out := place.evicted_for(size)) is not None]  # fmt: skip
            if not free:
                if (count := has.get(model.name, 0)) < model.copies:
                    full = "; ".join(place.room() for place in places if model.name not in place.secured)
                    problems.append(f"{model.name}: {count} of {model.copies} copies, no node has room: {full}")
                break
            place, out = min(free, key=lambda one: (len(one[1]), len(one[0].secured), sum(one[0].secured.values())))
            for name in out:
                steps.append(Step(UNLOAD, place.node.node, name, f"makes room for {model.name}", room_for=model.name))
                del place.loose[name]
            place.loose.pop(model.name, None)
            place.secured[model.name] = size
            count = has[model.name] = has.get(model.name, 0) + 1
            steps.append(Step(LOAD, place.node.node, model.name, f"copy {count} of {counts[model.name]}", model.digest))
    return steps, problems


def _amiss(model: Wanted, node: Holdings) -> str | None:
    """Why a resident model has to be loaded again; None: it need not."""
    resident = node.resident[model.name]
    if model.digest is not None and resident.digest != model.digest:
        return f"another version is in memory: {resident.digest}"
    if model.num_ctx is not None and resident.context is not None and resident.context != model.num_ctx:
        return f"in memory with a context of {resident.context}, the catalogue says {model.num_ctx}"
    return None if resident.lasting else "in memory for a while only"


def _size(name: str, nodes: Iterable[Holdings]) -> int:
    """Bytes that a model takes in memory, as far as somebody knows: measured, else that of its files."""
    nodes = list(nodes)
    measured = [node.resident[name].size for node in nodes if name in node.resident]
    return max(measured or [node.held[name].size for node in nodes if name in node.held], default=0)


def clipped(model: Wanted, trained: Mapping[str, int]) -> Wanted:
    """The same, with the context that a node can give: no model has more than it was trained with (by digest)."""
    most = trained.get(model.digest or "")
    if model.num_ctx is None or most is None or model.num_ctx <= most:
        return model
    return replace(model, num_ctx=most)


def digest_of(text: str) -> str:
    """``sha256:…``, as the catalogue writes it, of what a node says."""
    return f"sha256:{text}" if re.fullmatch(r"[0-9a-f]{64}", text) else text


def mirrored(model: str, registry: str | None) -> str:
    """The name to pull a model by: a registry in place of Ollama's library, unless the name has one itself."""
    parts = canonical_name(model).split("/")
    if registry is None or len(parts) > 2:
        return model
    return "/".join([registry, *(["library"] if len(parts) == 1 else []), *parts])


def permitted(model: str, registry: str | None, more: Collection[str]) -> bool:
    """Whether a node may be sent to where a model's name points: the library or what stands in its place, or a registry
    that is listed. As Ollama reads names: `host/namespace/model`; one with a scheme is none of ours."""
    parts = canonical_name(model).split("/")
    if "://" in model:
        return False
    return len(parts) <= 2 or parts[0].lower() in {*more, *([registry.lower()] if registry else [])}


def aside(model: str, namespace: str) -> str:
    """The name under which Corral keeps a version of a model beside the one in use."""
    base, _, tag = canonical_name(model).rpartition(":")
    flat = re.sub(r"[^A-Za-z0-9_.-]", ".", base)
    if len(flat) > 80:
        flat = f"{flat[:60]}.{hashlib.sha256(flat.encode()).hexdigest()[:16]}"
    return f"{OWN}{namespace}/{flat}:{tag}"


def is_own(model: str) -> bool:
    """Whether a name is one that Corral gave, and no caller's business."""
    return model.startswith(OWN) and "/" in model


def without(names: Collection[str], steps: Iterable[Step]) -> tuple[Step, ...]:
    """The steps that do not concern these models."""
    return tuple(step for step in steps if step.model not in names and step.room_for not in names)
