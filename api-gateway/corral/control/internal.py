"""What gateways ask of control: the snapshot, and a place for their spool. Never on the edge."""

from __future__ import annotations

import math
import re
import time
from typing import Annotated, Any
from urllib.parse import unquote

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from corral.control import discovery
from corral.control.context import Here
from corral.control.errors import Problem, answer
from corral.control.gateways import Told
from corral.store.ingest import WrongOffset, ingest
from corral.store.spool import SHIP_MAX, SpoolCorrupt

CHUNK_MAX = SHIP_MAX
SUSPECTS_MAX = 100
ASIDE_MAX = 20
_Amount = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
Row = tuple[_Amount, _Amount, _Amount, _Amount, _Amount]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ASIDE = re.compile(rf"({_NAME.pattern}/)?\d{{16}}\.(torn|corrupt)")

router = APIRouter(include_in_schema=False)


@router.get("/internal/snapshot")
async def snapshot(control: Here, request: Request, since: str = "") -> Response:
    """The snapshot, or 304 where `since` is its version; for how long its keys were not read again (seconds), which
    gateways are heard, and whether others of them have the store."""
    hub = control.hub
    hub.refresh()
    name = request.headers.get("x-corral-gateway", "")
    if _NAME.fullmatch(name):
        left = "x-corral-leaving" in request.headers
        await hub.heard(name, since, _told(request), left)
        if left:  # control itself may end before its ledger's next round
            await control.ledger.note_shipped()
    headers = {"X-Corral-Now": f"{time.time():.3f}", "X-Corral-Age": f"{hub.age:.3f}"}
    headers["X-Corral-Gateways"] = ",".join(hub.sharing())
    if hub.elsewhere(name):
        headers["X-Corral-Store-Elsewhere"] = "1"
    if control.questions.of(name):
        headers["X-Corral-Asked"] = "1"
    if since == hub.version:
        return Response(status_code=304, headers=headers)
    return Response(hub.content(), media_type="application/json", headers=headers)


@router.get("/internal/spent")
async def spent(control: Here) -> dict[str, Any]:
    """What keys and tenants have used of their budgets, by the records."""
    return await control.spent.told()


@router.post("/internal/spool/{gateway}/{segment}")
async def spool(
    control: Here, request: Request, gateway: str, segment: str, offset: Annotated[int, Query(ge=0, lt=2**63)]
) -> Response:
    """Take frames of a segment from `offset` on: exactly once, or 409 with the offset that is expected."""
    for field, name in (("gateway", gateway), ("segment", segment)):
        if not _NAME.fullmatch(name):
            raise Problem(400, "bad_request", f"{field}: not a name")
    data = await _body(request)
    try:
        taken = await control.database.write(ingest, gateway, segment, offset, data)
    except WrongOffset as error:
        return JSONResponse({"offset": error.offset}, status_code=409)
    except SpoolCorrupt as error:
        return answer(Problem(400, "corrupt_frame", str(error), offset=error.offset))
    control.usage.ingested(taken, control.hub, control.fleet)
    return JSONResponse({"offset": taken.watermark})


@router.post("/internal/requests/{gateway}")
async def answers(control: Here, request: Request, gateway: str) -> dict[str, Any]:
    """Take a gateway's answers (`Questions.take`); what it has still to answer."""
    try:
        told = msgspec.json.decode(await _body(request), type=list[dict[str, Any]])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Problem(400, "bad_request", f"expected a list of answers: {error}") from None
    control.questions.take(gateway, told)
    return {"questions": control.questions.of(gateway)}


async def _body(request: Request) -> bytes:
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > CHUNK_MAX:
            raise Problem(413, "request_too_large", f"more than {CHUNK_MAX} bytes at once")
    return bytes(data)


def _told(request: Request) -> Told:
    """What a gateway says of itself with its question for a snapshot."""
    peer = request.client.host if request.client is not None else ""
    metrics = discovery.address(request.headers.get("x-corral-metrics", ""), peer)
    try:
        queues = msgspec.json.decode(request.headers.get("x-corral-queues", "{}"), type=dict[str, Row])
    except (msgspec.DecodeError, UnicodeEncodeError):
        queues = {}
    return Told(
        metrics,
        _number(request, "x-corral-backlog"),
        _number(request, "x-corral-as-of"),
        _runners(request, "x-corral-suspects"),
        _runners(request, "x-corral-crowded"),
        {model: list(row) for model, row in queues.items()},
        int(_number(request, "x-corral-aside")),
        tuple(filter(_ASIDE.fullmatch, request.headers.get("x-corral-aside-names", "").split(",")[:ASIDE_MAX])),
        {"1": True, "0": False}.get(request.headers.get("x-corral-store", "")),
    )


def _number(request: Request, header: str) -> float:
    try:
        value = float(request.headers.get(header, "0")[:32])
    except ValueError:
        return 0.0
    return value if math.isfinite(value) and value > 0.0 else 0.0


def _runners(request: Request, header: str) -> dict[str, frozenset[str]]:
    """Models by node."""
    found: dict[str, set[str]] = {}
    for runner in request.headers.get(header, "").split(",")[:SUSPECTS_MAX]:
        node, _, model = runner.partition("/")
        if node and model:
            found.setdefault(unquote(node), set()).add(unquote(model))
    return {node: frozenset(models) for node, models in found.items()}
