"""What waits and what runs now, over all gateways, and how a request is ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Annotated, Any, Literal

import hiredis
import msgspec
from fastapi import APIRouter, Query
from sqlalchemy import Connection

from corral.control.audit import of_key, record
from corral.control.auth import Caller, Principal
from corral.control.context import Control, Here
from corral.control.errors import Problem
from corral.control.gateways import Gateway
from corral.control.questions import Told
from corral.fleet.node import canonical_name
from corral.fleet.tickets import estimate
from corral.store.demand import order
from corral.store.keys import masked
from corral.store.valkey import ValkeyDown

router = APIRouter(tags=["requests"])

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]


class _Entry(msgspec.Struct):
    """A request as its gateway tells it (`corral.gateway.report`)."""

    id: str
    request_id: str
    key: str
    tenant: str
    route: str
    model: str
    state: Literal["queued", "loading", "running"]
    position: _Count | None
    waited: _Seconds
    node: str | None
    tokens: int  # as a node said
    attempts: _Count
    age: _Seconds
    ticket: tuple[str, str, _Count, _Seconds, _Seconds] | None


class _Listed(msgspec.Struct):
    requests: list[_Entry]
    total: _Count


@router.get("/admin/requests")
async def list_requests(
    control: Here,
    caller: Caller,
    model: Annotated[str | None, Query(description="For this model.")] = None,
    key: Annotated[str | None, Query(description="Of this key: its id or its name.")] = None,
    state: Annotated[Literal["queued", "loading", "running"] | None, Query(description="In this state.")] = None,
) -> dict[str, Any]:
    """Requests that wait or run, the oldest first; for an operator those of its tenant.

    ``silent`` are gateways that did not say in time, ``left_out`` counts requests beyond a gateway's first thousand.
    Times are seconds.
    """
    wanted = None if key is None else await control.database.read(of_key, caller, key)
    told = understood(await control.questions.ask("list", tenant=caller.bound))
    found = await _placed(control, caller, told)
    name = None if model is None else canonical_name(model)
    shown = [
        one
        for one in found
        if name in (None, one["model"]) and (wanted is None or one["key"] in wanted) and state in (None, one["state"])
    ]
    left_out = sum(answer["total"] - len(answer["requests"]) for answer in told.answers.values())
    return {"requests": shown, "silent": told.silent, "left_out": left_out}


@router.get("/admin/requests/{request}")
async def show_request(control: Here, caller: Caller, request: str) -> dict[str, Any]:
    """One request that waits or runs, by its id or the `X-Request-ID` of its answer."""
    return await _find(control, caller, request)


@router.post("/admin/requests/{request}/cancel")
async def cancel_request(control: Here, caller: Caller, request: str) -> dict[str, Any]:
    """End a request that waits or runs: its caller gets an error (403 `cancelled`, in band once its answer began)."""
    found = await _find(control, caller, request)
    # Recorded first: what cannot be recorded is not done.
    await control.database.write(_record, caller, found)
    told = await control.questions.ask("cancel", found["id"], only=found["gateway"])
    if not told.answers:
        raise Problem(503, "no_answer", f"{found['gateway']} did not say in time whether it has ended {found['id']}")
    if not told.answers[found["gateway"]]:
        raise Problem(409, "ended", f"{found['id']} had ended by itself")
    return {**found, "cancelled": True}


def waits(gateways: Iterable[Gateway]) -> list[dict[str, Any]]:
    """By model what gateways said of their queues: how many wait, the oldest's wait, and what one more would wait at a
    guess (seconds)."""
    found: dict[str, list[list[float]]] = {}
    for gateway in gateways:
        for model, told in gateway.queues.items():
            found.setdefault(model, []).append(told)
    shown = []
    for model, rows in sorted(found.items()):
        waiting, slots = int(sum(row[0] for row in rows)), int(max(row[2] for row in rows))
        seconds = sum(row[0] * row[4] for row in rows) / max(1, waiting)
        wait = estimate(waiting + 1, slots, seconds, max(row[3] for row in rows))
        oldest = max(row[1] for row in rows)
        shown.append({"model": model, "waiting": waiting, "oldest": round(oldest, 1), "estimate": round(wait, 3)})
    return shown


async def _find(control: Control, caller: Principal, id: str) -> dict[str, Any]:
    told = understood(await control.questions.ask("find", id, tenant=caller.bound))
    found = await _placed(control, caller, told)
    # The other id is its caller's choice: what one calls its request hides no other.
    found = [one for one in found if one["id"] == id] or found
    if len(found) > 1:
        ids = ", ".join([one["id"] for one in found[:5]] + ["…"] * (len(found) > 5))
        raise Problem(409, "ambiguous", f"several requests are called {masked(id)!r}: use an id ({ids})")
    if not found:
        unheard = f"; {', '.join(told.silent)} did not say in time" if told.silent else ""
        raise Problem(404, "not_found", f"no request {masked(id)[:64]!r} waits or runs{unheard}")
    return found[0]


async def _placed(control: Control, caller: Principal, told: Told) -> list[dict[str, Any]]:
    """The requests of all answers that a caller may know of, the oldest first, with their positions and estimates."""
    found = [one for one in _entries(told) if caller.bound in (None, one["tenant"])]
    tickets = {(one["gateway"], one["ticket"][1]): one["ticket"][0] for one in found if one["ticket"]}
    try:
        positions, slots = await order(control.valkey, tickets)
    except (ValkeyDown, hiredis.HiredisError, TimeoutError):
        positions, slots = {}, {}
    # Each gateway has seen other requests of a model; who stands further back must not be told the shorter wait.
    taken: dict[str, dict[str, float]] = {}
    for one in found:
        if one["ticket"]:
            taken.setdefault(one["ticket"][0], {})[one["gateway"]] = one["ticket"][4]
    for one in found:
        ticket, wait = one.pop("ticket"), None
        if ticket:
            model, id, known, load, _ = ticket
            seconds = fmean(taken[model].values())
            one["position"] = positions.get((one["gateway"], id), one["position"])
            if one["position"]:
                wait = round(estimate(one["position"], slots.get(model) or known, seconds, load), 3)
        one["estimate"] = wait
    return sorted(found, key=lambda one: -one["age"])


def understood(told: Told) -> Told:
    """What gateways said, without answers that make no sense: those are as good as none."""
    answers: dict[str, Any] = {}
    for gateway, answer in told.answers.items():
        with contextlib.suppress(msgspec.ValidationError):
            answers[gateway] = msgspec.to_builtins(msgspec.convert(answer, _Listed))
    return Told(answers, sorted({*told.silent, *(told.answers.keys() - answers.keys())}))


def _entries(told: Told) -> Iterator[dict[str, Any]]:
    for gateway, answer in told.answers.items():
        for one in answer["requests"]:
            yield {**one, "gateway": gateway}


def _record(connection: Connection, who: Principal, found: dict[str, Any]) -> None:
    names = ("id", "request_id", "key", "model", "state", "node", "tokens", "gateway")
    before = {name: found[name] for name in names}
    after = {"id": found["id"], "state": "cancelled"}
    record(connection, who, "POST", f"/admin/requests/{found['id']}/cancel", before, after, tenant=found["tenant"])
