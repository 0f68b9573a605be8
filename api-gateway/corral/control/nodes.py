"""Nodes: those of corral.yaml and those added by API; HAProxy knows a node before any gateway does."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import httpx
from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, delete, select, update
from sqlalchemy.exc import SQLAlchemyError

from corral.config.reader import hint
from corral.config.settings import NodeSettings
from corral.config.values import BaseUrl, Name, Size, Whole, host_port, loopback
from corral.control.audit import record
from corral.control.auth import Caller, Principal
from corral.control.context import Control, Here
from corral.control.errors import Problem
from corral.control.haproxy import HaproxyError, HaproxyUnwritten
from corral.control.prober import Member
from corral.control.reached import TIMEOUT
from corral.store import answers
from corral.store.database import insert
from corral.store.tables import nodes

DRAIN = 30.0
LONGEST = 3600.0
ACKNOWLEDGE = 1.5
POLL = 0.1
SHOWN = 1.0
"""How long a list of nodes waits for HAProxy (seconds)."""
FIELDS = ("url", "slots", "memory", "max_models", "accelerator")

log = logging.getLogger(__name__)
router = APIRouter(tags=["nodes"])
Row = tuple[str, str, int]
"""The method, route and status that a change of a node is recorded with."""

Wait = Annotated[float, Query(ge=0, le=LONGEST, description="Seconds to wait for its streams.")]


class NewNode(BaseModel):
    """A node to add."""

    model_config = ConfigDict(extra="forbid")

    url: BaseUrl = Field(description="Where its API listens.")
    name: Name | None = Field(None, description="node-N, the first that is free, by default.")
    slots: Whole = Field(4, ge=1, le=1024, description="Requests at once per model (OLLAMA_NUM_PARALLEL).")
    memory: Size | None = Field(None, description="Memory for models.")
    max_models: Whole | None = Field(None, ge=1, le=1024, description="Resident at once.")
    accelerator: Literal["gpu", "cpu"] | None = None
    preload: bool = Field(True, description="Into service once it has its models of the catalogue.")


@router.get("/admin/nodes")
async def list_nodes(control: Here) -> dict[str, Any]:
    """All nodes as the prober sees them, with the requests that still run on one that is drained (`streams`)."""
    members = list(control.fleet.members.values())
    left = await asyncio.gather(*(_left(control, member) for member in members))
    return {"nodes": [{**one.describe(), "streams": streams} for one, streams in zip(members, left, strict=True)]}


@router.post("/admin/nodes", status_code=201)
async def add_node(control: Here, caller: Caller, wanted: NewNode) -> dict[str, Any]:
    """Add a node: HAProxy gets its back end first, then the gateways hear of it.

    One that does not answer is added all the same: `state` is down, and `reason` says why.
    """
    async with control.fleet.changing:
        members = control.fleet.members
        name = wanted.name or next(
            name for number in range(1, len(members) + 2) if (name := f"node-{number}") not in members
        )
        if name in members:
            raise Problem(409, "conflict", f"name: there is a node {name} already")
        for member in members.values():
            if _place(member.url) == _place(wanted.url):
                raise Problem(409, "conflict", f"url: {member.name} is at {member.url} already")
        row = {**wanted.model_dump(exclude={"preload"}), "name": name, "source": "api"}
        member = Member(**row)
        await _refuse_corral(control, member)
        await _serve(control, [*_pairs(control), (name, wanted.url)])
        await _recorded(control, _enter, caller, row)
        await control.fleet.add(member, control.preloader.begin if wanted.preload else lambda _: None)
    return member.describe()


@router.delete("/admin/nodes/{name}")
async def remove_node(control: Here, caller: Caller, name: str, wait: Wait = DRAIN) -> dict[str, Any]:
    """Remove a node: it gets no new work, its streams may end within `wait`, then HAProxy forgets it.

    Two records: that its removal began (202), and that it is gone. Where it fails, it has its work again.
    """
    known = control.fleet.members.get(name)
    was_draining = known is not None and known.draining
    route = f"/admin/nodes/{name}"
    member = await _set_draining(control, caller, name, True, ("DELETE", route, 202))
    streams, _ = await _drained(control, name, wait)
    try:
        async with control.fleet.changing:
            if control.fleet.members.get(name) is not member:
                raise Problem(404, "not_found", f"there is no node {name!r}")
            if not member.draining:  # it has streams again, which would be cut
                raise Problem(409, "conflict", f"{name} was given work again meanwhile, and stays")
            await _serve(control, [pair for pair in _pairs(control) if pair[0] != name])
            await _recorded(control, _leave, caller, member.describe())
            await control.fleet.remove(name)
            control.preloader.forget(member)
    except (Problem, SQLAlchemyError):
        if control.fleet.members.get(name) is member and not was_draining:
            try:
                await _set_draining(control, caller, name, False, ("DELETE", route, 500))
            except SQLAlchemyError:
                log.error("%s stays drained: that it has work again could not be recorded", name)
        raise
    return {"name": name, "removed": True, "streams": streams}


@router.post("/admin/nodes/{name}/drain")
async def drain_node(control: Here, caller: Caller, name: str, wait: Wait = 0.0) -> dict[str, Any]:
    """Give a node no new work; wait at most `wait` seconds for what runs on it.

    `drained` and `streams` are null where HAProxy cannot say what runs there, and `reason` is why.
    """
    member = await _set_draining(control, caller, name, True, ("POST", f"/admin/nodes/{name}/drain", 200))
    return await _drain(control, member, wait)


@router.get("/admin/nodes/{name}/drain")
async def wait_for_node(control: Here, name: str, wait: Wait = 0.0) -> dict[str, Any]:
    """The same of a node that is drained already; 409 where it is not: somebody has given it work again."""
    member = control.fleet.members.get(name)
    if member is None:
        raise no_node(control, name)
    return await _drain(control, member, wait if member.draining else 0.0)


async def _drain(control: Control, member: Member, wait: float) -> dict[str, Any]:
    streams, reason = await _drained(control, member.name, wait)
    if not member.draining:
        raise Problem(409, "conflict", f"{member.name} is not drained: it was given work again")
    drained = None if streams is None else streams == 0
    return {**member.describe(), "drained": drained, "streams": streams, "reason": reason}


@router.post("/admin/nodes/{name}/resume")
async def resume_node(
    control: Here,
    caller: Caller,
    name: str,
    preload: Annotated[bool, Query(description="Once it has its models of the catalogue.")] = True,
) -> dict[str, Any]:
    """Give a drained node work again, or one that is kept out of service by preloading."""
    row = "POST", f"/admin/nodes/{name}/resume", 200
    member = await _set_draining(control, caller, name, False, row, preload)
    if not preload and (held := member.preloading) is not None:
        await control.database.write(_serves, caller, member.describe(), held, row)
        control.preloader.forget(member)
        control.hub.refresh()
    return member.describe()


def _place(url: str) -> tuple[str, int]:
    """Where a URL leads: host and port, one word for this machine's loopback."""
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    return "127.0.0.1" if loopback(host) else host, parts.port or (443 if parts.scheme == "https" else 80)


async def _refuse_corral(control: Control, member: Member) -> None:
    """Ask a node that is to be added, and refuse an address of Corral itself: requests would go in a circle."""
    settings = control.settings
    own = [settings.edge.port, *([settings.edge.tls_port] if settings.edge.certificate else [])]
    listens = [settings.control.listen, settings.gateway.listen, *filter(None, [settings.edge.ollama])]
    ports = {*own, _place(settings.gateway.nodes_url)[1], *(host_port(listen)[1] for listen in listens)}
    host, port = _place(member.url)
    itself = host == "127.0.0.1" and port in ports
    if not itself:
        await control.fleet.probe(member)
        if not member.answered and "status 40" in (member.error or ""):
            itself = await _is_corral(control, member.url)
    if itself:
        wanted = "a node is an Ollama server, such as http://10.0.0.11:11434"
        raise Problem(409, "conflict", f"url: {member.url} is an address of Corral itself: {wanted}")


async def _is_corral(control: Control, url: str) -> bool:
    """Whether what asks for a key, or has no such route, is a part of Corral; Ollama has no /health."""
    try:
        status, body = await answers.fetch(control.fleet.client, "GET", url + "/health", timeout=TIMEOUT)
    except (httpx.HTTPError, ValueError):
        return False
    return status == 200 and b'"healthy"' in body


def no_node(control: Control, name: str) -> Problem:
    """What is said of a node that is not of the fleet; the nearest one is named."""
    return Problem(404, "not_found", f"there is no node {name!r}{hint(name[:64], list(control.fleet.members))}")


async def _set_draining(
    control: Control, who: Principal, name: str, draining: bool, row: Row, preload: bool = False
) -> Member:
    async with control.fleet.changing:
        member = control.fleet.members.get(name)
        if member is None:
            raise no_node(control, name)
        if member.draining != draining:
            await control.database.write(_mark, who, member.describe(), draining, row)
            member.draining = draining
            if draining:
                control.preloader.forget(member)
            elif preload:
                control.preloader.begin(member)
            control.hub.refresh()
            try:
                await control.haproxy.apply(_pairs(control), keep=True, resting=_resting(control))
            except HaproxyError as error:
                # The gateways know; the front end for other programs will when HAProxy reads its file.
                log.warning("%s: HAProxy was not told of its draining: %s", name, error)
    return member


async def _drained(control: Control, name: str, wait: float) -> tuple[int | None, str | None]:
    """Streams on a node that gateways give no more work, once there are none or `wait` seconds are over.

    None, and why, where HAProxy did not say until then; one that is being started gets the time to.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + wait
    if wait:
        # A gateway that has not heard of it yet may just be sending something there.
        await control.hub.acknowledged(control.hub.number, min(wait, ACKNOWLEDGE))
    known: int | None = None
    while True:
        reason: str | None = None
        try:
            known = await control.haproxy.streams(name)
        except HaproxyError as error:
            reason = str(error)
        if (known == 0 and reason is None) or loop.time() >= until or not control.haproxy.configured:
            # What it said a moment ago is more than that it does not answer just now.
            return known, reason if known is None else None
        await asyncio.sleep(POLL)


async def _left(control: Control, member: Member) -> int | None:
    """How many requests still run on a node that is drained. None where that is not known: a gateway may not have heard
    of it."""
    if not member.draining or any(one.version != control.hub.version for one in control.hub.present()):
        return None
    try:
        async with asyncio.timeout(SHOWN):
            return await control.haproxy.streams(member.name)
    except (HaproxyError, TimeoutError):
        return None


def _pairs(control: Control) -> list[tuple[str, str]]:
    return [(node.name, node.url) for node in control.fleet.members.values()]


def _resting(control: Control) -> list[str]:
    return [node.name for node in control.fleet.members.values() if node.draining]


async def _serve(control: Control, pairs: Sequence[tuple[str, str]]) -> None:
    try:
        await control.haproxy.apply(pairs, resting=_resting(control))
    except HaproxyError as error:
        full = isinstance(error, HaproxyUnwritten)
        raise Problem(503 if full else 502, "haproxy_failed", f"nothing was changed: {error}") from None


async def _recorded(control: Control, write: Callable[..., None], *args: Any) -> None:
    """Enter what HAProxy was told already; where that cannot be recorded, HAProxy is told that it is not so."""
    try:
        await control.database.write(write, *args)
    except SQLAlchemyError:
        try:
            await control.haproxy.apply(_pairs(control), keep=True, resting=_resting(control))
        except HaproxyError as error:
            log.error("HAProxy has nodes that the fleet has not, until it is told again: %s", error)
        raise


# -- in the database


def load(connection: Connection, configured: Sequence[NodeSettings]) -> list[Member]:
    """The fleet at the start: corral.yaml's nodes, but for those an operator removed, and those added by API."""
    known = {row.name: row for row in connection.execute(select(nodes))}
    for node in configured:
        row = {**node.model_dump(), "source": "config"}
        fresh = {**row, "draining": False, "removed": False, "created": time.time()}
        statement = insert(connection, nodes).values(fresh)
        connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=row))
    names = [node.name for node in configured]
    gone = [row.name for row in known.values() if row.source == "config" and row.name not in names]
    connection.execute(delete(nodes).where(nodes.c.name.in_(gone)))
    rows = connection.execute(select(nodes).where(~nodes.c.removed).order_by(nodes.c.created, nodes.c.name))
    return [
        Member(
            name=row.name,
            source=row.source,
            draining=row.draining,
            **{field: getattr(row, field) for field in FIELDS},
        )
        for row in rows
    ]


def _enter(connection: Connection, who: Principal, row: dict[str, Any]) -> None:
    fresh = {**row, "draining": False, "removed": False, "created": time.time()}
    # One of corral.yaml that was removed is known as that, until another one takes its name.
    names = [nodes.c[name] for name in (*row, "removed")]
    old = connection.execute(select(*names).where(nodes.c.name == row["name"])).mappings().first()
    statement = insert(connection, nodes).values(fresh)
    connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=fresh))
    record(connection, who, "POST", "/admin/nodes", dict(old) if old is not None else None, row, status=201)


def _leave(connection: Connection, who: Principal, node: dict[str, Any]) -> None:
    this = nodes.c.name == node["name"]
    if node["source"] == "config":
        connection.execute(update(nodes).where(this).values(removed=True, draining=False))
    else:
        connection.execute(delete(nodes).where(this))
    record(connection, who, "DELETE", f"/admin/nodes/{node['name']}", _short(node), None)


def _mark(connection: Connection, who: Principal, node: dict[str, Any], draining: bool, row: Row) -> None:
    connection.execute(update(nodes).where(nodes.c.name == node["name"]).values(draining=draining))
    before = _short(node)
    method, route, status = row
    record(connection, who, method, route, before, before | {"draining": draining}, status)


def _serves(connection: Connection, who: Principal, node: dict[str, Any], held: str, row: Row) -> None:
    before = _short(node)
    method, route, status = row
    record(connection, who, method, route, before | {"preloading": held}, before | {"preloading": None}, status)


def _short(node: dict[str, Any]) -> dict[str, Any]:
    return {name: node[name] for name in ("name", *FIELDS, "source", "state")}
