"""Tenants: whom keys and records belong to. An operator sees its own alone."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from sqlalchemy import Connection, delete, update

from corral.control.audit import record
from corral.control.auth import Caller, Principal
from corral.control.context import Here
from corral.control.errors import Problem
from corral.control.keys import Limits, Text
from corral.store import tenants as store
from corral.store.tables import tenants

router = APIRouter(tags=["tenants"])


class Shared(Limits):
    """Limits that the keys of a tenant share, beside those that each has; null is none."""


class NewTenant(Shared):
    """A tenant to make."""

    name: Text


@router.get("/admin/tenants")
async def list_tenants(control: Here, caller: Caller) -> dict[str, Any]:
    """All tenants, each with the number of its keys that work."""
    return {"tenants": await control.database.read(store.listed, caller.bound)}


@router.post("/admin/tenants", status_code=201)
async def create_tenant(control: Here, caller: Caller, wanted: NewTenant) -> dict[str, Any]:
    """Make a tenant. A key for a tenant that is not there yet makes it as well with `new_tenant`."""
    made = await control.database.write(_create, caller, wanted)
    await control.hub.reload()
    return made


@router.get("/admin/tenants/{tenant}")
async def show_tenant(control: Here, caller: Caller, tenant: str) -> dict[str, Any]:
    """One tenant."""
    return await control.database.read(_find, caller, tenant)


@router.patch("/admin/tenants/{tenant}")
async def limit_tenant(control: Here, caller: Caller, tenant: str, wanted: Shared) -> dict[str, Any]:
    """Change the limits that are given; null takes one away. Every gateway has them within a second."""
    made = await control.database.write(_limit, caller, tenant, wanted)
    await control.hub.reload()
    return made


@router.delete("/admin/tenants/{tenant}")
async def remove_tenant(control: Here, caller: Caller, tenant: str) -> dict[str, Any]:
    """Remove a tenant that has no key which still works; its records stay."""
    gone = await control.database.write(_remove, caller, tenant)
    await control.hub.reload()
    return gone


# -- in the database


def _find(connection: Connection, who: Principal, name: str) -> dict[str, Any]:
    found = store.find(connection, name) if who.bound in (None, name) else None
    if found is None:
        raise Problem(404, "not_found", f"there is no tenant {name!r}")
    return found


def _create(connection: Connection, who: Principal, wanted: NewTenant) -> dict[str, Any]:
    if not store.enter(connection, **wanted.model_dump()):
        raise Problem(409, "conflict", f"name: there is a tenant {wanted.name!r} already")
    made = _find(connection, who, wanted.name)
    record(connection, who, "POST", "/admin/tenants", None, made, status=201, tenant=wanted.name)
    return made


def _limit(connection: Connection, who: Principal, name: str, wanted: Shared) -> dict[str, Any]:
    before = _find(connection, who, name)
    changes = wanted.model_dump(exclude_unset=True)
    if changes:
        connection.execute(update(tenants).where(tenants.c.name == name).values(**changes))
    made = _find(connection, who, name)
    record(connection, who, "PATCH", "/admin/tenants/" + name, before, made, tenant=name)
    return made


def _remove(connection: Connection, who: Principal, name: str) -> dict[str, Any]:
    found = _find(connection, who, name)
    if name == store.DEFAULT:
        raise Problem(409, "default", "keys that name no tenant are of this one: it stays")
    if found["keys"]:
        count = found["keys"]
        said = f"{count} keys of {name!r} still work: revoke them first"
        raise Problem(409, "in_use", f"1 key of {name!r} still works: revoke it first" if count == 1 else said)
    connection.execute(delete(tenants).where(tenants.c.name == name))
    record(connection, who, "DELETE", "/admin/tenants/" + name, found, None, tenant=name)
    return {"name": name, "removed": True}
