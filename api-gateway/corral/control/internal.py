"""What gateways ask of control: the snapshot, and a place for their spool. Never on the edge."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from corral.control import discovery
from corral.control.context import Here
from corral.control.errors import Problem, answer
from corral.store.ingest import WrongOffset, ingest
from corral.store.spool import SHIP_MAX, SpoolCorrupt

CHUNK_MAX = SHIP_MAX
SUSPECTS_MAX = 100

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

router = APIRouter(include_in_schema=False)


@router.get("/internal/snapshot")
async def snapshot(control: Here, request: Request, since: str = "") -> Response:
    """The snapshot, or 304 where `since` is its version."""
    hub = control.hub
    hub.refresh()
    name = request.headers.get("x-corral-gateway", "")
    if _NAME.fullmatch(name):
        await hub.heard(name, since, *_told(request), left="x-corral-leaving" in request.headers)
    if since == hub.version:
        return Response(status_code=304)
    return Response(hub.content(), media_type="application/json")


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
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > CHUNK_MAX:
            raise Problem(413, "request_too_large", f"more than {CHUNK_MAX} bytes of frames at once")
    try:
        taken = await control.database.write(ingest, gateway, segment, offset, bytes(data))
    except WrongOffset as error:
        return JSONResponse({"offset": error.offset}, status_code=409)
    except SpoolCorrupt as error:
        return answer(Problem(400, "corrupt_frame", str(error), offset=error.offset))
    control.usage.ingested(taken, control.hub, control.fleet)
    return JSONResponse({"offset": taken.watermark})


def _told(request: Request) -> tuple[str, float, dict[str, frozenset[str]]]:
    """Where a gateway says its metrics are, how long its oldest unshipped record waits, and which runners it suspects:
    models by node."""
    peer = request.client.host if request.client is not None else ""
    try:
        behind = float(request.headers.get("x-corral-backlog", "0")[:32])
    except ValueError:
        behind = 0.0
    metrics = discovery.address(request.headers.get("x-corral-metrics", ""), peer)
    suspects: dict[str, set[str]] = {}
    for runner in request.headers.get("x-corral-suspects", "").split(",")[:SUSPECTS_MAX]:
        node, _, model = runner.partition("/")
        if node and model:
            suspects.setdefault(unquote(node), set()).add(unquote(model))
    told = {node: frozenset(models) for node, models in suspects.items()}
    return metrics, behind if math.isfinite(behind) and behind > 0.0 else 0.0, told
