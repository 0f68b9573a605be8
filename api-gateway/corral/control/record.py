"""The record as others check and count it: sealed records, checkpoints, and usage."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, RowMapping, select

from corral.config.reader import hint
from corral.config.record import AuditSettings
from corral.config.values import duration_text
from corral.control.audit import moment, of_key, record
from corral.control.auth import Caller, Principal
from corral.control.checkpoints import page, pages
from corral.control.context import Here
from corral.control.errors import Problem
from corral.store import seal, tenants, usage
from corral.store.chain import FIELDS
from corral.store.checkpoints import last_checkpoint
from corral.store.content import Hashes
from corral.store.tables import audit, audit_content, keys
from corral.store.tables import usage as sums
from corral.store.trail import named
from corral.store.usage import REFUSED
from corral.store.verify import PAGE

MONTH = 30 * 86400.0
SAME_ID_MAX = 1000
"""Records of one request id, which is the caller's to choose, that are compared."""

NDJSON = "application/x-ndjson"
REQUEST = r"^[A-Za-z0-9._-]+$"

router = APIRouter()
_encode = msgspec.json.Encoder().encode


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Digests = Annotated[list[Digest], Field(min_length=1, max_length=4)] | None


class Texts(BaseModel):
    """Texts, by their SHA-256, and the request that they may be of. Several: one of them is it."""

    model_config = ConfigDict(extra="forbid")

    request: Annotated[str, Field(min_length=1, max_length=128, pattern=REQUEST)] = Field(
        description="`X-Request-ID` of its answer, or the record's id."
    )
    prompt: Digests = Field(None, description="SHA-256 of the request's body.")
    answer: Digests = Field(None, description="SHA-256 of the answer's text.")


def _json(value: object) -> Response:
    # Without FastAPI's own way, which looks at each value: a page has thousands of rows.
    return Response(_encode(value), media_type="application/json")


@router.get("/admin/audit/chain", tags=["audit"])
async def chain(control: Here) -> Response:
    """Each stream's end and what of it is signed, the last checkpoint, the public key, and a record's fields."""
    state, checkpoint = await control.database.read(lambda c: (seal.state(c), last_checkpoint(c)))
    streams = {
        name: {"pos": head.pos, "link": head.link.hex(), "signed": head.signed, "highest": head.highest}
        for name, head in state.heads.items()
    }
    found = {"streams": streams, "outside": state.outside, "older": state.older, "last_older": state.last_older}
    told = {
        "fields": FIELDS,
        "checkpoint": checkpoint,
        "public_key": control.ledger.signer.public,
    }
    return _json(found | told)


@router.post("/admin/audit/compare", tags=["audit"])
async def compare(control: Here, caller: Caller, texts: Texts) -> dict[str, Any]:
    """Whether a text is the prompt or the answer of a request: true, false, or null where its record has no hash of it.

    Each record of that request id is compared. An operator is shown those of its tenant.
    """
    if texts.prompt is None and texts.answer is None:
        raise Problem(400, "bad_request", "give a prompt, an answer, or both")
    found = await control.database.read(_compare, caller, texts, control.hashes)
    # Who may ask this often enough may guess: each question is in the trail, with its answer. Written by itself: no
    # other writer has to wait until the records are found.
    shown = [{name: one[name] for name in one if name not in ("seq", "ts")} for one in found[-20:]]
    told = {"request": texts.request, "records": shown}
    await control.database.write(record, caller, "POST", "/admin/audit/compare", None, told)
    return {"records": found}


def _compare(connection: Connection, who: Principal, texts: Texts, hashes: Hashes) -> list[dict[str, Any]]:
    column = audit.c
    wanted = named(texts.request, who.bound), column.api != "admin"
    chosen = select(column.id, column.seq, column.ts, column.prompt_hash, column.answer_hash).where(*wanted)
    rows = connection.execute(chosen.order_by(column.seq.desc()).limit(SAME_ID_MAX)).mappings().all()
    if not rows:
        raise Problem(404, "not_found", _unknown(connection, who, texts.request))
    found = []
    for row in reversed(rows):
        one: dict[str, Any] = {name: row[name] for name in ("id", "seq", "ts")}
        for name, given, keyed in (
            ("prompt", texts.prompt, hashes.prompt),
            ("answer", texts.answer, hashes.answer),
        ):
            if given is not None:
                kept = row[f"{name}_hash"]
                one[name] = None if kept is None else kept in [keyed.of(bytes.fromhex(digest)) for digest in given]
        found.append(one)
    return found


@router.get("/admin/audit/content", tags=["audit"])
async def content(
    control: Here,
    caller: Caller,
    request: Annotated[str, Query(max_length=128, pattern=REQUEST, description="`X-Request-ID`, or a record's id.")],
) -> dict[str, Any]:
    """Prompt and answer of a request whose key has them kept: an age file in base64, by record.

    `content_hash` is the SHA-256 that the record names, null where it is of an older version.
    """
    rows = await control.database.read(texts_of, request)
    if not rows:
        why = await control.database.read(_why_nothing, caller, request, control.settings.audit)
        raise Problem(404, "not_found", why)
    return {"content": [{**row, "data": b64encode(row["data"]).decode()} for row in rows]}


def texts_of(connection: Connection, request: str) -> Sequence[RowMapping]:
    """What is kept of a request, with what its records name."""
    chosen = (
        select(audit_content, audit.c.content_hash)
        .join(audit, audit.c.id == audit_content.c.id)
        .where(named(request))
        .order_by(audit.c.seq)
    )
    return connection.execute(chosen.limit(SAME_ID_MAX // 10)).mappings().all()


def _unknown(connection: Connection, who: Principal, request: str) -> str:
    """Why there is nothing to look at of a request that has no record of its own."""
    wanted = select(audit.c.route).where(named(request, who.bound), audit.c.api == "admin")
    if connection.execute(wanted.limit(1)).first() is not None:
        return f"{request!r} is a call of the admin API: only requests for models have a prompt and an answer"
    late = "that of one which has just ended comes within some seconds"
    return f"there is no record of a request {request!r}: `corral audit list` shows those that there are; {late}"


def _why_nothing(connection: Connection, who: Principal, request: str, settings: AuditSettings) -> str:
    """Why no text is kept of a request."""
    column = audit.c
    chosen = select(column.key, column.ts, column.outcome, keys.c.name, keys.c.content)
    chosen = chosen.outerjoin_from(audit, keys, column.key == keys.c.id).where(named(request), column.api != "admin")
    row = connection.execute(chosen.order_by(column.seq.desc()).limit(1)).first()
    if row is None:
        return _unknown(connection, who, request)
    if settings.content != "full":
        why = f"audit.content is {settings.content!r}; with 'full' it is kept for keys made with --content"
    elif not row.content:
        why = f"its key {row.name or ''} ({row.key}) was made without --content"
    elif row.outcome in REFUSED:
        why = f"it was refused (outcome {row.outcome}), and no node has seen it"
    elif row.ts < time.time() - settings.content_retention:
        why = f"audit.content_retention ({duration_text(settings.content_retention)}) is over"
    else:
        why = "its text has not come from its gateway yet (some seconds), or the key had none kept then"
    return f"nothing is kept of the request {request!r}: {why}"


@router.get("/admin/audit/records", tags=["audit"])
async def sealed(
    control: Here,
    stream: Annotated[str, Query(max_length=63, description="Of this gateway, `control`, or none.")],
    after: Annotated[int, Query(ge=0, lt=2**63, description="Behind this place.")] = 0,
    limit: Annotated[int, Query(ge=1, le=PAGE)] = PAGE,
) -> Response:
    """Sealed records in the order of the chain: values in the order of `fields`, then the leaf (hex).

    Those of the stream without a name are older than the chain, by their numbers, and have no leaf.
    `kept`: the SHA-256 of the texts that are kept of some of them, by the record's id.
    """
    rows = await control.database.read(seal.records, stream, after, limit)
    kept = {row["id"]: row["kept"] for row in rows if row["kept"] is not None}
    return _json({"records": [[*(row[name] for name in FIELDS), _leaf(row)] for row in rows], "kept": kept})


def _leaf(row: dict[str, Any]) -> str | None:
    return None if row["leaf"] is None else str(row["leaf"].hex())


@router.get("/admin/audit/checkpoints", tags=["audit"])
async def checkpoints(
    control: Here,
    after: Annotated[int, Query(ge=0, lt=2**63, description="Behind the first so many.")] = 0,
    limit: Annotated[int | None, Query(ge=1, le=PAGE, description="Checkpoints at most; all by default.")] = None,
) -> Response:
    """The file of checkpoints, a signed checkpoint a line, and what the database has behind its end."""
    lines = control.ledger.lines
    # The first of them before the answer begins: then it may still be an error.
    some = await page(lines, control.database, after, limit)
    if limit is not None:
        return Response(b"".join(some), media_type=NDJSON)
    return StreamingResponse(pages(lines, control.database, after, some), media_type=NDJSON)


@router.get("/admin/usage", tags=["usage"])
async def report(
    control: Here,
    caller: Caller,
    by: Annotated[str, Query(max_length=40, description="Columns to sum by: day, tenant, key, model.")] = "key,model",
    since: Annotated[str | None, Query(description="From this day on; 30 days ago by default.")] = None,
    until: Annotated[str | None, Query(description="To this day; today by default.")] = None,
    tenant: str | None = None,
    key: Annotated[str | None, Query(description="Of this key: its id, or the name of one or several.")] = None,
    model: str | None = None,
) -> dict[str, Any]:
    """Requests, tokens, time and cost of whole days (UTC). An operator is shown those of its tenant."""
    columns = [name.strip() for name in by.split(",") if name.strip()]
    if not columns or len(set(columns)) < len(columns) or set(columns) - set(usage.BY):
        raise Problem(400, "bad_request", f"by: expected some of {', '.join(usage.BY)}, each once")
    now = time.time()
    begin = now - MONTH if since is None else moment(since, "since")
    end = now if until is None else moment(until, "until")
    if caller.bound is not None:
        if tenant not in (None, caller.bound):
            raise Problem(403, "forbidden", f"tenant: a key of tenant {caller.bound!r} sees that tenant alone")
        tenant = caller.bound
    elif tenant is not None:
        await control.database.read(_known_tenant, tenant)
    ids = None if key is None else await control.database.read(of_key, caller, key)
    only = {"tenant": tenant, "key": ids, "model": model}
    costs = control.settings.usage
    # Prices are a model's: summed by model first, whatever is asked for.
    inner = columns if "model" in columns or not costs.prices else [*columns, "model"]
    rows = await control.database.read(lambda c: usage.report(c, begin, end, inner, **only))
    rows = usage.priced(rows, columns, costs.price_of if costs.prices else None)
    told = {"usage": rows, "since": usage.day_of(begin), "until": usage.day_of(end), "by": columns}
    return told | ({"currency": costs.currency} if costs.prices else {})


def _known_tenant(connection: Connection, name: str) -> None:
    """Refuse a tenant that is not there and has not used anything: of one that was removed, its usage stays."""
    used = select(sums.c.tenant).where(sums.c.tenant == name).limit(1)
    if tenants.find(connection, name) is None and connection.execute(used).first() is None:
        near = hint(name[:64], [one["name"] for one in tenants.listed(connection)])
        more = near or ": `corral tenants list` shows those that there are"
        raise Problem(404, "not_found", f"tenant: there is no tenant {name!r}{more}")
