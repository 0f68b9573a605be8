"""Keys: made, listed, rotated, revoked. A key's text is shown once, when it is made."""

from __future__ import annotations

import ipaddress
import re
import shlex
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Response
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from sqlalchemy import ColumnElement, Connection, Row, delete, func, insert, select, true, update

from corral.config.reader import hint
from corral.config.values import Whole, duration
from corral.control.audit import record
from corral.control.auth import Caller, Principal
from corral.control.context import Control, Here
from corral.control.errors import Problem
from corral.control.scope import ROLES, Scope, excess, kept, narrowed
from corral.store import keys as keytext
from corral.store import tenants
from corral.store.tables import key_verifiers, keys

OVERLAP = 86400.0
DEADLINE_MAX = 7 * 86400.0
LATEST = datetime(3000, 1, 1, tzinfo=UTC).timestamp()

router = APIRouter(tags=["keys"])


def _moment(value: object) -> float:
    """Epoch seconds of seconds from now, ``30d``, epoch seconds or an ISO 8601 time; it must be to come."""
    now = time.time()
    wanted = "expected seconds from now, 30d, or a time such as 2027-01-31T12:00:00Z"
    try:
        if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d", value):
            parsed = datetime.fromisoformat(value)
            at = (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
        else:
            seconds = duration(value)
            at = seconds if seconds >= 1e9 else now + seconds
    except (ValueError, OverflowError):
        raise ValueError(wanted) from None
    if at <= now:
        raise ValueError("must be in the future")
    if at >= LATEST:
        raise ValueError("must be before the year 3000; null is never")
    return at


def _network(value: str) -> str:
    try:
        network = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ValueError("expected an address or a network such as 10.1.0.0/16 or 2001:db8::/32") from None
    # IPv4 in IPv6's clothes (RFC 4291, section 2.5.5.2) is taken for what it is, of callers (`keys.allows`) as here.
    mapped = network.network_address.ipv4_mapped if isinstance(network, ipaddress.IPv6Network) else None
    return f"{mapped}/{network.prefixlen - 96}" if mapped is not None and network.prefixlen >= 96 else str(network)


Text = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]
Glob = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x20\x7f]+$")]
Globs = Annotated[list[Glob], Field(min_length=1, max_length=100)]
Cidr = Annotated[str, Field(max_length=64), AfterValidator(_network)]
Limit = Annotated[Whole, Field(ge=1, le=2**53)] | None
Deadline = (
    Annotated[float, BeforeValidator(duration, json_schema_input_type=str | float), Field(gt=0, le=DEADLINE_MAX)] | None
)
Weight = Annotated[float, Field(ge=0.1, le=100)] | None
WEIGHT = "Its share where keys wait for the same model: one of 2 has twice what one of 1 has, which is that of most."


class Limits(BaseModel):
    """The limits that a key has, or that those of a tenant share."""

    model_config = ConfigDict(extra="forbid")

    rpm: Limit = Field(None, description="Requests a minute.")
    tpm: Limit = Field(None, description="Tokens a minute.")
    concurrency: Limit = Field(None, description="Requests at once.")
    daily_tokens: Limit = Field(None, description="Tokens a day (UTC).")
    monthly_tokens: Limit = Field(None, description="Tokens a month (UTC).")


class NewKey(Limits):
    """A key to make. Limits that are left out are the defaults of corral.yaml."""

    name: Text = Field(description="For people; need not be unique.")
    role: Literal["inference", "operator", "admin"] = "inference"
    models: Globs = Field(default_factory=lambda: ["*"], description="Globs of the models it may use.")
    networks: Annotated[list[Cidr], Field(max_length=100)] = Field(
        default_factory=list, description="Addresses and networks that it may be used from; none: from anywhere."
    )
    kind: Literal["interactive", "batch"] = Field("interactive", alias="class")
    expires: Annotated[float, BeforeValidator(_moment, json_schema_input_type=str | float)] | None = Field(
        None, description="Seconds from now, a duration such as 30d, or an ISO 8601 time; null: never."
    )
    content: bool = Field(False, description="Its prompts and answers are kept, with `audit.content: full`.")
    deadline: Deadline = Field(
        None, description="How long a request may take that has no `X-Corral-Deadline-Ms`: seconds, or 30s."
    )
    weight: Weight = Field(None, description=WEIGHT)
    tenant: Text | None = Field(None, description="That of the key that makes it, by default.")
    new_tenant: bool = Field(False, description="The tenant is made where it is new; otherwise that is refused.")


class Changes(Limits):
    """What of a key may be changed; what is left out stays, and a limit that is null is the default of corral.yaml."""

    models: Globs = Field(default_factory=lambda: ["*"], description="Globs of the models it may use.")
    deadline: Deadline = Field(
        None, description="How long a request may take that has no `X-Corral-Deadline-Ms`: seconds, or 30s; null: any."
    )
    weight: Weight = Field(None, description=WEIGHT)


class Rotation(BaseModel):
    """How a key is rotated."""

    model_config = ConfigDict(extra="forbid")

    overlap: Annotated[float, BeforeValidator(duration, json_schema_input_type=str | float)] = Field(
        OVERLAP, le=366 * 86400, description="How long the old text goes on working: seconds, or 24h."
    )
    end_oldest: bool = Field(
        False,
        description="One that an earlier rotation left ends now; otherwise that is refused, but for an overlap of 0.",
    )


@router.get("/admin/keys")
async def list_keys(control: Here, caller: Caller) -> dict[str, Any]:
    """All keys, revoked and expired ones too; for an operator those of its tenant."""
    return {"keys": await control.database.read(_list, caller)}


@router.post("/admin/keys", status_code=201)
async def create_key(control: Here, caller: Caller, wanted: NewKey, response: Response) -> dict[str, Any]:
    """Make a key, which may do no more than the one that makes it; its text is in this answer alone."""
    key_id, text = keytext.generate()
    proof = keytext.verifier(control.pepper, text)
    made = await control.database.write(_create, caller, wanted, _defaults(control), key_id, proof)
    await control.hub.spread()
    response.headers["Cache-Control"] = "no-store"
    return {**made, "key": text, "notes": kept(wanted.content, control.settings.audit.content)}


@router.get("/admin/keys/{key}")
async def show_key(control: Here, caller: Caller, key: str) -> dict[str, Any]:
    """One key, by its id or by a name that only one has; ``limits`` are those in force, the defaults included."""
    found = await control.database.read(lambda connection: _describe(connection, _find(connection, caller, key)))
    defaults = _defaults(control)
    own = {name: found[name] for name in defaults if found[name] is not None}
    return {**found, "limits": {**defaults, **own}}


@router.patch("/admin/keys/{key}")
async def update_key(control: Here, caller: Caller, key: str, wanted: Changes) -> dict[str, Any]:
    """Change what is given of a key, which may do no more than the caller's; which gateways took note in a second.

    Keys that it made may do no more than it from then on: ``narrowed`` has those that were changed for that.
    """
    changes = wanted.model_dump(exclude_unset=True)
    made = await control.database.write(_update, caller, key, changes, _defaults(control))
    return {**made, "gateways": await control.hub.spread()}


@router.post("/admin/keys/{key}/rotate")
async def rotate_key(
    control: Here, caller: Caller, key: str, response: Response, how: Annotated[Rotation | None, Body()] = None
) -> dict[str, Any]:
    """Give a key a new text; the old one works on for `overlap`. A 409 while one older still works: two at most do."""
    row = await control.database.read(_find, caller, key)
    text = keytext.secret_for(row.id)
    proof = keytext.verifier(control.pepper, text)
    made = await control.database.write(_rotate, caller, row.id, _defaults(control), proof, how or Rotation())
    await control.hub.spread()
    response.headers["Cache-Control"] = "no-store"
    return {**made, "key": text}


@router.post("/admin/keys/{key}/revoke")
async def revoke_key(control: Here, caller: Caller, key: str) -> dict[str, Any]:
    """End a key at once; says which gateways have taken note within a second."""
    return await _revoke_everywhere(control, caller, key, "POST")


@router.delete("/admin/keys/{key}")
async def delete_key(control: Here, caller: Caller, key: str) -> dict[str, Any]:
    """The same as revoke: the audit trail goes on naming the key."""
    return await _revoke_everywhere(control, caller, key, "DELETE")


async def _revoke_everywhere(control: Control, caller: Principal, key: str, method: str) -> dict[str, Any]:
    made = await control.database.write(_revoke, caller, key, method)
    return {**made, "gateways": await control.hub.spread()}


def _defaults(control: Control) -> dict[str, Any]:
    """The limits of a key that has none."""
    return control.settings.limits.default.model_dump()


# -- in the database


def _list(connection: Connection, who: Principal) -> list[dict[str, Any]]:
    ends = dict(
        connection.execute(
            select(key_verifiers.c.key_id, func.max(key_verifiers.c.expires)).group_by(key_verifiers.c.key_id)
        ).all()
    )
    rows = connection.execute(select(keys).where(_seen(who)).order_by(keys.c.created, keys.c.id)).all()
    return [_view(row, ends.get(row.id)) for row in rows]


def _describe(connection: Connection, row: Row[Any]) -> dict[str, Any]:
    proof = key_verifiers.c
    ends = connection.execute(select(func.max(proof.expires)).where(proof.key_id == row.id)).scalar()
    return _view(row, ends)


def _view(row: Row[Any], ends: float | None) -> dict[str, Any]:
    shown = dict(row._mapping)
    revoked = shown.pop("revoked")
    rotating = ends if ends is not None and ends > time.time() else None
    shown["networks"] = shown["networks"] or []
    shown["content"] = bool(shown["content"])
    return {**shown, "revoked": revoked is not None, "revoked_at": revoked, "rotating_until": rotating}


def _seen(who: Principal) -> ColumnElement[bool]:
    """Keys that a caller may know of."""
    return true() if who.bound is None else keys.c.tenant == who.bound


def _find(connection: Connection, who: Principal, key: str) -> Row[Any]:
    row = connection.execute(select(keys).where((keys.c.id == key) & _seen(who))).first()
    if row is not None:
        return row
    # Those that were revoked last: their name is free again.
    wanted = select(keys).where((keys.c.name == key) & _seen(who)).order_by(keys.c.revoked.is_not(None), keys.c.created)
    named = connection.execute(wanted.limit(6)).all()
    if named and named[0].revoked is None:
        named = [row for row in named if row.revoked is None]
    if len(named) > 1:
        ids = ", ".join([row.id for row in named[:5]] + ["…"] * (len(named) > 5))
        raise Problem(409, "ambiguous", f"several keys are called {key!r}: use an id ({ids})")
    if not named:
        raise Problem(404, "not_found", f"there is no key {keytext.masked(key)!r}")
    return named[0]


def _no_more(connection: Connection, who: Principal, row: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse a text for a key that may do more than the caller's may by now: writers wait for each other."""
    if reason := excess(Scope.of(row), Scope.of(_still(connection, who)._asdict()), defaults):
        raise Problem(403, "forbidden", reason)


def _still(connection: Connection, who: Principal) -> Row[Any]:
    """The caller's key. Refuses one that was revoked while it waited for its turn to write."""
    own = connection.execute(select(keys).where(keys.c.id == who.key_id)).one()
    if own.revoked is not None:
        raise Problem(401, "unauthorized", "the API key was revoked")
    return own


def _create(
    connection: Connection, who: Principal, wanted: NewKey, defaults: Mapping[str, Any], key_id: str, proof: str
) -> dict[str, Any]:
    now = time.time()
    row = {**wanted.model_dump(by_alias=True, exclude={"new_tenant"}), "id": key_id, "created": now}
    row["tenant"] = tenant = wanted.tenant or who.tenant
    row["networks"], row["maker"] = wanted.networks or None, who.key_id
    _no_more(connection, who, row, defaults)
    if wanted.tenant and not wanted.new_tenant and tenants.find(connection, tenant) is None:
        raise Problem(404, "no_tenant", _no_tenant(tenant, [one["name"] for one in tenants.listed(connection)]))
    if tenants.enter(connection, tenant):
        record(connection, who, "POST", "/admin/tenants", None, tenants.find(connection, tenant), 201, tenant)
    connection.execute(insert(keys).values(row))
    connection.execute(insert(key_verifiers).values(verifier=proof, key_id=key_id, created=now))
    made = _describe(connection, _find(connection, who, key_id))
    record(connection, who, "POST", "/admin/keys", None, made, status=201, tenant=tenant)
    return made


def _no_tenant(tenant: str, known: list[str]) -> str:
    new = f"if it is to be new: `corral tenants create {shlex.quote(tenant)}`, or --new-tenant (API: `new_tenant`)"
    return f"tenant: there is no tenant {tenant!r}{hint(tenant, known) or ';'} {new}"


def _update(
    connection: Connection, who: Principal, key: str, changes: dict[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    row = _find(connection, who, key)
    before = _describe(connection, row)
    _still(connection, who)
    if ROLES.index(row.role) > ROLES.index(who.role):
        raise Problem(403, "forbidden", f"a key of role {who.role} changes none of role {row.role}")
    if row.revoked is not None:
        raise Problem(409, "revoked", "the key was revoked: make a new one")
    after = {**row._asdict(), **changes}
    bounds = set(changes) - {"deadline"}
    if bounds:
        _no_more(connection, who, after, defaults)
        maker = connection.execute(select(keys).where(keys.c.id == row.maker)).first()
        if maker is not None and row.id != who.key_id and excess(Scope.of(after), Scope.of(maker._asdict()), defaults):
            changes["maker"] = who.key_id
    made = _change(connection, who, row, before, changes)
    return {**made, "narrowed": _narrow(connection, who, after, defaults) if bounds else []}


def _change(
    connection: Connection, who: Principal, row: Row[Any], before: dict[str, Any], changes: dict[str, Any]
) -> dict[str, Any]:
    if changes:
        connection.execute(update(keys).where(keys.c.id == row.id).values(**changes))
    made = _describe(connection, connection.execute(select(keys).where(keys.c.id == row.id)).one())
    record(connection, who, "PATCH", f"/admin/keys/{row.id}", before, made, tenant=row.tenant)
    return made


def _narrow(connection: Connection, who: Principal, key: dict[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Have the keys that a key made, and those that they made, do no more than it now may; the ids of those changed.

    Of revoked ones nothing is said.
    """
    done, makers = [], [key]
    while makers:
        maker = makers.pop()
        for row in connection.execute(select(keys).where(keys.c.maker == maker["id"]).order_by(keys.c.id)).all():
            changes = narrowed(Scope.of(row._asdict()), Scope.of(maker), defaults)
            if not changes:
                continue
            makers.append({**row._asdict(), **changes})
            if row.revoked is not None:
                connection.execute(update(keys).where(keys.c.id == row.id).values(**changes))
            else:
                _change(connection, who, row, _describe(connection, row), changes)
                done.append(row.id)
    return done


def _rotate(
    connection: Connection, who: Principal, key_id: str, defaults: Mapping[str, Any], proof: str, how: Rotation
) -> dict[str, Any]:
    row = _find(connection, who, key_id)
    if row.revoked is not None:
        raise Problem(409, "revoked", "the key was revoked: make a new one")
    if row.id != who.key_id:
        _no_more(connection, who, row._asdict(), defaults)
    before, now, column = _describe(connection, row), time.time(), key_verifiers.c
    mine, oldest = column.key_id == key_id, before["rotating_until"]
    if oldest is not None and how.overlap > 0 and not how.end_oldest:
        raise Problem(409, "rotating", _rotating(oldest), rotating_until=oldest)
    # Two texts at most: what an earlier rotation left ends here, and so does the last one without an overlap.
    left = mine if how.overlap <= 0 else mine & column.expires.is_not(None)
    connection.execute(delete(key_verifiers).where(left))
    connection.execute(update(key_verifiers).where(mine).values(expires=now + how.overlap))
    connection.execute(insert(key_verifiers).values(verifier=proof, key_id=key_id, created=now))
    made = _describe(connection, row)
    record(connection, who, "POST", f"/admin/keys/{key_id}/rotate", before, made, tenant=row.tenant)
    return made


def _rotating(oldest: float) -> str:
    ends = datetime.fromtimestamp(oldest, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return (
        f"the text that the last rotation replaced works until {ends}, and this would end it now, as a key has two at "
        "most: wait until then, or say --end-oldest (API: `end_oldest`); --overlap 0s ends every text but the new one"
    )


def _revoke(connection: Connection, who: Principal, key: str, method: str) -> dict[str, Any]:
    row = _find(connection, who, key)
    before = _describe(connection, row)
    if ROLES.index(row.role) > ROLES.index(who.role):
        raise Problem(403, "forbidden", f"a key of role {who.role} revokes none of role {row.role}")
    if row.revoked is not None:
        return before
    _still(connection, who)
    if row.role == "admin":
        column = keys.c
        alive = column.revoked.is_(None) & (column.expires.is_(None) | (column.expires > time.time()))
        others = select(func.count()).where((column.role == "admin") & (column.id != row.id) & alive)
        if not connection.execute(others).scalar():
            raise Problem(409, "last_admin", "this is the last admin key: make another one first")
    connection.execute(update(keys).where(keys.c.id == row.id).values(revoked=time.time()))
    made = _describe(connection, _find(connection, who, row.id))
    route = f"/admin/keys/{row.id}" + ("/revoke" if method == "POST" else "")
    record(connection, who, method, route, before, made, tenant=row.tenant)
    return made
