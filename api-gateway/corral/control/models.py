"""Models: what the fleet holds beside what the catalogue asks for, and the operations that bring the two together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection

from corral.config.reader import hint
from corral.config.settings import ModelSettings
from corral.control.audit import record
from corral.control.auth import Caller, Principal
from corral.control.catalogue import enter, forget, view
from corral.control.context import Control, Here
from corral.control.errors import Problem
from corral.control.modelops import UNLISTED
from corral.control.nodes import no_node
from corral.control.operations import CANCELLED, Besides, Operation, Work
from corral.fleet import catalogue as decide
from corral.fleet.catalogue import LOAD, PULL, REMOVE, UNLOAD, Step, digest_of
from corral.fleet.node import canonical_name
from corral.fleet.pools import model_of

LONGEST = 30.0

router = APIRouter(tags=["models"])
ModelName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:/@-]*$")]


class Apply(BaseModel):
    """Which plan to carry out."""

    model_config = ConfigDict(extra="forbid")

    plan: str | None = Field(None, description="The `id` of the plan that was looked at; another one is refused.")


class Choice(BaseModel):
    """Models and nodes."""

    model_config = ConfigDict(extra="forbid")

    models: Annotated[list[ModelName], Field(max_length=100)] = Field(
        default_factory=list, description="Names; preload: the catalogue where there are none."
    )
    nodes: list[str] | None = Field(None, description="Names; all nodes by default.")
    force: bool = Field(False, description="unload: pinned models too; remove: those of the catalogue too.")
    accept: bool = Field(
        False, description="pull: record the digest that comes, for models without one in corral.yaml."
    )


@router.get("/admin/models")
async def list_models(control: Here) -> dict[str, Any]:
    """Every model that a node holds, the catalogue names or somebody disabled: where it is, in the right version?"""
    catalogue = control.catalogue
    named = (*catalogue.entries, *control.hub.disabled)
    found: dict[str, dict[str, Any]] = {name: _model(control, name) for name in named}
    for node in control.fleet.members.values():
        resident = set(node.resident) if node.up else set()
        for entry in node.tags:
            name = entry["name"]
            if decide.is_own(name):
                continue
            model = found.setdefault(name, _model(control, name))
            for field in ("digest", "size", "details"):
                model[field] = entry.get(field) if model[field] is None else model[field]
            model["nodes"].append(node.name)
            model["continuation"] = model["continuation"] or control.selftest.said(str(entry.get("digest") or ""))
            expected = model["expected"]
            if expected is not None and digest_of(str(entry.get("digest"))) != expected:
                model["differs"].append(node.name)
            if name in resident:
                model["resident"].append(node.name)
    for model in found.values():
        model["match"] = _match(control, model)
    return {"models": [found[name] for name in sorted(found)]}


def _model(control: Control, name: str) -> dict[str, Any]:
    wanted = control.catalogue.want(name)
    known = name in control.catalogue.entries
    return {
        **{"name": name, "digest": None, "size": None, "details": None, "nodes": [], "resident": []},
        **{"catalogue": known, "pinned": wanted.pin, "copies": wanted.copies if known else None},
        **{"expected": wanted.digest, "stated": wanted.stated, "differs": []},
        **{"disabled": name in control.hub.disabled, "disabled_reason": control.hub.disabled.get(name)},
        "continuation": None,
    }


def _match(control: Control, model: dict[str, Any]) -> str | None:
    """Whether every node that is up has the right version: ok, differs, missing or unrecorded; None: not asked for."""
    if not model["catalogue"]:
        return None
    up = {node.name for node in control.fleet.members.values() if node.up}
    if model["differs"]:
        return "differs"
    if up - set(model["nodes"]):
        return "missing"
    return "ok" if model["expected"] else "unrecorded"


@router.get("/admin/models/plan")
async def plan_models(control: Here) -> dict[str, Any]:
    """The steps that would put the catalogue in force; nothing is changed."""
    await control.catalogue.refresh()
    made, _ = control.catalogue.plan()
    steps = [Work(step).describe() for step in made.steps]
    names = {"problems": list(made.problems), "notes": list(made.notes)}
    return {"id": made.fingerprint, "steps": steps, **names, "catalogue": len(control.catalogue.entries)}


@router.get("/admin/models/why")
async def explain_model(control: Here, model: Annotated[ModelName, Query()]) -> dict[str, Any]:
    """Why a model stands where it does: the leader's last decisions, newest first.

    Ages in seconds; `leader`: this control leads.
    """
    name = canonical_name(model)
    placement = control.leading.placement if control.leading.leads else None
    held = {entry["name"] for node in control.fleet.members.values() for entry in node.tags}
    if name not in held and name not in control.catalogue.entries:
        near = _near(name, held | set(control.catalogue.entries))
        raise Problem(404, "model_not_found", f"no node holds {name}, and the catalogue does not name it{near}")
    now = asyncio.get_running_loop().time()
    known = {"places": [], "waits": None, "decisions": []} if placement is None else placement.about(name, now)
    hub = control.hub
    off = {"disabled": name in hub.disabled, "disabled_reason": hub.disabled.get(name), "held": name in held}
    return {"model": name, "leader": placement is not None, **off, **known}


@router.post("/admin/models/apply", status_code=202)
async def apply_models(control: Here, caller: Caller, how: Annotated[Apply | None, Body()] = None) -> dict[str, Any]:
    """Put the catalogue in force: an operation, to be watched at /admin/operations/ID."""
    if not control.catalogue.entries:
        raise Problem(409, "no_catalogue", "the catalogue is empty: name models in corral.yaml (models:)")
    await control.catalogue.refresh()
    made, fresh = control.catalogue.plan()
    if how is not None and how.plan is not None and how.plan != made.fingerprint:
        raise Problem(409, "plan_changed", "the fleet has changed since that plan was made: plan again")
    works = [Work(step) for step in made.steps]
    operation = Operation("apply", caller, works, made.problems, made.notes)
    recorded: dict[str, str] = {}

    def besides(connection: Connection) -> None:
        recorded.update(enter(connection, fresh))

    await control.operations.start(operation, "/admin/models/apply", besides)
    control.catalogue.recorded |= recorded
    return operation.describe()


@router.post("/admin/models/pull", status_code=202)
async def pull_models(control: Here, caller: Caller, wanted: Choice) -> dict[str, Any]:
    """Pull models onto nodes; those of the catalogue must come with its digest."""
    names = _names(wanted)
    _permit(control, names)
    for name in names:
        entry = control.catalogue.entries.get(name)
        if wanted.accept and entry is not None and entry.digest is not None:
            raise Problem(409, "stated", f"corral.yaml states the digest of {name}: put the new one there")
    steps = [
        Step(PULL, node, name, "asked for", None if wanted.accept else control.catalogue.want(name).digest)
        for node in _nodes(control, wanted)
        for name in names
    ]
    return await _begin(control, caller, "pull", steps, accept=wanted.accept)


@router.post("/admin/models/load", status_code=202)
async def load_models(control: Here, caller: Caller, wanted: Choice) -> dict[str, Any]:
    """Load models for good, as requests through the gateways use them."""
    names = _names(wanted)
    await control.catalogue.refresh()
    steps: list[Step] = []
    problems: list[str] = []
    for node in _nodes(control, wanted):
        here = view(control.fleet.members[node])
        room = here.max_models
        for name in names:
            others = set(here.resident) | {step.model for step in steps if step.node == node}
            others.discard(name)
            loose = sorted(others - control.catalogue.entries.keys() - set(names))
            taken = {step.model for step in steps if step.node == node and step.action == UNLOAD}
            if room is not None and len(others - taken) >= room:
                free = [one for one in loose if one not in taken][: len(others - taken) - room + 1]
                if len(others - taken) - len(free) >= room:
                    full = ", ".join(sorted(others - taken))
                    problems.append(f"{node}: {name}: no room (max_models {room}), in memory: {full}")
                    continue
                steps += [Step(UNLOAD, node, one, f"makes room for {name}", room_for=name) for one in free]
            steps.append(Step(LOAD, node, name, "asked for", control.catalogue.want(name).digest))
    return await _begin(control, caller, "load", steps, problems)


@router.post("/admin/models/preload", status_code=202)
async def preload_models(control: Here, caller: Caller, wanted: Choice) -> dict[str, Any]:
    """Pull models and load them, on every node: those of the catalogue where none is named."""
    names = [canonical_name(name) for name in wanted.models] or list(control.catalogue.entries)
    if not names:
        raise Problem(400, "bad_request", "models: the catalogue is empty: name the models")
    _permit(control, names)
    await control.catalogue.refresh()
    chosen = set(_nodes(control, wanted))
    models = [control.catalogue.want(name) for name in names]
    made = decide.plan(models, control.catalogue.holdings(chosen), everywhere=True)
    works = [Work(step) for step in made.steps]
    operation = Operation("preload", caller, works, made.problems, made.notes)
    return (await control.operations.start(operation, "/admin/models/preload")).describe()


@router.post("/admin/models/unload", status_code=202)
async def unload_models(control: Here, caller: Caller, wanted: Choice) -> dict[str, Any]:
    """Take models out of memory, once their requests have ended; `notes` say what loads them again."""
    names = _names(wanted)
    for name in names:
        if control.catalogue.want(name).pin and not wanted.force:
            raise Problem(409, "pinned", f"{name} is pinned in the catalogue: --force (force) unloads it all the same")
    chosen = _nodes(control, wanted)
    # In memory it may be without its file.
    resident = {name for member in control.fleet.members.values() for name in view(member).resident}
    await _held(control, [name for name in names if name not in resident], chosen)
    steps = [Step(UNLOAD, node, name, "asked for") for node in chosen for name in names]
    return await _begin(control, caller, "unload", steps, notes=tuple(_returns(control, names)))


def _returns(control: Control, names: list[str]) -> Iterator[str]:
    """What loads models again that are unloaded, and how they are kept out of memory."""
    now, placement = asyncio.get_running_loop().time(), control.leading.placement
    known = placement.known if placement is not None and control.leading.leads else None
    for name in names:
        if name not in control.hub.disabled:
            if known is None:
                when = "where it was asked for lately, or is"
            elif any(one.wanted(now) for counted, one in known.items() if model_of(counted) == name):
                when = "at once, as it was asked for lately"
            else:
                when = "for the next request that asks for it"
            yield f"{name} is loaded again {when}: `corral models disable {name}` refuses those"
        if (entry := control.catalogue.entries.get(name)) is not None:
            where = "1 node" if entry.copies == 1 else f"{entry.copies} nodes"
            loads = "`corral models apply`, a node that comes back and control's next start load it again"
            yield f"the catalogue has {name} in memory on {where}: {loads}, unless corral.yaml names it no more"


@router.post("/admin/models/remove", status_code=202)
async def remove_models(control: Here, caller: Caller, wanted: Choice) -> dict[str, Any]:
    """Delete models from nodes, with the previous versions that are kept there."""
    names = _names(wanted)
    for name in names:
        if name in control.catalogue.entries and not wanted.force:
            raise Problem(409, "in_catalogue", f"the catalogue names {name}: take it out of corral.yaml first")
    chosen = _nodes(control, wanted)
    await _held(control, names, chosen)
    steps = [Step(REMOVE, node, name, "asked for") for node in chosen for name in names]
    gone = names if wanted.nodes is None else []
    begun = await _begin(control, caller, "remove", steps, besides=lambda connection: forget(connection, gone))
    for name in gone:
        control.catalogue.recorded.pop(name, None)
    return begun


@router.put("/admin/models/catalogue")
async def replace_catalogue(
    control: Here, caller: Caller, models: Annotated[list[ModelSettings], Body(max_length=1000)]
) -> dict[str, Any]:
    """Put another catalogue in force until control restarts: what `corral config reload` does with corral.yaml's."""
    names = [canonical_name(model.name) for model in models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Problem(400, "bad_request", f"models: {twice[0]} is there twice")
    before = [entry.model_dump(mode="json") for entry in control.catalogue.entries.values()]
    after = [model.model_dump(mode="json") for model in models]
    stated = control.catalogue.stated(models)
    control.catalogue.recorded |= await control.database.write(_replaced, caller, before, after, stated)
    control.catalogue.replace(models)
    control.preloader.look()
    control.hub.replace(models)
    control.hub.refresh()
    return {"models": after}


def _replaced(
    connection: Connection,
    who: Principal,
    before: list[Any],
    after: list[Any],
    stated: Mapping[str, tuple[str, str]],
) -> dict[str, str]:
    record(connection, who, "PUT", "/admin/models/catalogue", {"models": before}, {"models": after})
    return enter(connection, stated, anew=True)


async def _begin(
    control: Control,
    who: Principal,
    kind: str,
    steps: list[Step],
    problems: list[str] | None = None,
    accept: bool = False,
    besides: Besides | None = None,
    notes: tuple[str, ...] = (),
) -> dict[str, Any]:
    works = [Work(step) for step in steps]
    operation = Operation(kind, who, works, tuple(problems or ()), notes, accept)
    return (await control.operations.start(operation, f"/admin/models/{kind}", besides)).describe()


def _names(wanted: Choice) -> list[str]:
    names = list(dict.fromkeys(canonical_name(name) for name in wanted.models))
    if not names:
        raise Problem(400, "bad_request", "models: name at least one")
    return names


async def _held(control: Control, names: list[str], nodes: list[str]) -> None:
    """Refuse names that none of the nodes has, in a previous version either. Of one that is down nobody can tell."""
    members = [control.fleet.members[node] for node in nodes]
    await asyncio.gather(*(control.fleet.probe(member, fresh=True) for member in members))
    held = {entry["name"] for member in members for entry in member.tags}
    for name in names if all(member.up for member in members) else ():
        if not held & {name, decide.aside(name, "previous"), decide.aside(name, "aside")}:
            where = f"none of {', '.join(nodes)} holds" if len(nodes) < len(control.fleet.members) else "no node holds"
            near = _near(name, held) or ": `corral models list` shows what there is"
            raise Problem(404, "model_not_found", f"{where} {name}{near}")


def _near(name: str, known: set[str]) -> str:
    # The tag that most of them have makes any two look alike.
    return hint(name.removesuffix(":latest"), sorted(one.removesuffix(":latest") for one in known))


def _permit(control: Control, names: list[str]) -> None:
    """Refuse names that would send a node to a host that nobody listed."""
    mirror = control.settings.mirror
    for name in names:
        if not decide.permitted(name, mirror.registry, mirror.registries):
            raise Problem(403, "registry_not_listed", UNLISTED.format(name))


def _nodes(control: Control, wanted: Choice) -> list[str]:
    known = control.fleet.members
    for name in wanted.nodes or ():
        if name not in known:
            raise no_node(control, name)
    chosen = list(dict.fromkeys(wanted.nodes)) if wanted.nodes else list(known)
    if not chosen:
        raise Problem(409, "no_nodes", "the fleet has no node")
    return chosen


# -- operations


@router.get("/admin/operations", tags=["operations"])
async def list_operations(control: Here) -> dict[str, Any]:
    """What runs, and what ended lately."""
    return {"operations": [one.describe() for one in control.operations.all()]}


@router.get("/admin/operations/{operation}", tags=["operations"])
async def show_operation(
    control: Here,
    operation: str,
    after: Annotated[int, Query(description="Answer once it is past this `version`.")] = -1,
    wait: Annotated[float, Query(ge=0, le=LONGEST, description="Seconds to wait for that.")] = 0.0,
) -> dict[str, Any]:
    """An operation's steps and how far they are; ask again with its `version` to hear of news."""
    found = control.operations.find(operation)
    if wait:
        await found.changed(after, wait)
    return found.describe()


@router.post("/admin/operations/{operation}/cancel", tags=["operations"])
async def cancel_operation(control: Here, caller: Caller, operation: str) -> dict[str, Any]:
    """Stop an operation; what is done stays done."""
    found = control.operations.find(operation)
    if found.ended is None:
        await control.database.write(_cancelled, caller, found)
        control.operations.cancel(found)
        await found.changed(1 << 60, LONGEST)
    return found.describe()


def _cancelled(connection: Connection, who: Principal, operation: Operation) -> None:
    before = {"kind": operation.kind, "state": operation.state, "steps": operation.states}
    after = {"kind": operation.kind, "state": CANCELLED}
    record(connection, who, "POST", f"/admin/operations/{operation.id}/cancel", before, after)
