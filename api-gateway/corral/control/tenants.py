"""Tenants: whom keys and records belong to. An operator sees its own alone."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, delete

from corral.control.audit import record
from corral.control.auth import Caller, Principal
from corral.control.context import Here
from corral.control.errors import Problem
from corral.store import tenants as store
from corral.store.tables import tenants

TenantName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]

router = APIRouter(tags=["tenants"])


class NewTenant(BaseModel):
    """A tenant to make."""

    model_config = ConfigDict(extra="forbid")

    name: TenantName


@router.get("/admin/tenants")
async def list_tenants(control: Here, caller: Caller) -> dict[str, Any]:
    """All tenants, each with the number of its keys that work."""
    return {"tenants": await control.database.read(store.listed, caller.bound)}


@router.post("/admin/tenants", status_code=201)
async def create_tenant(control: Here, caller: Caller, wanted: NewTenant) -> dict[str, Any]:
    """Make a tenant. A key for a tenant that is not there yet makes it as well."""
    made = await control.database.write(_create, caller, wanted)
    await control.hub.reload()
    return made


@router.get("/admin/tenants/{tenant}")
async def show_tenant(control: Here, caller: Caller, tenant: str) -> dict[str, Any]:
    """One tenant."""
    return await control.database.read(_find, caller, tenant)


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
    if not store.enter(connection, wanted.name):
        raise Problem(409, "conflict", f"name: there is a tenant {wanted.name!r} already")
    made = _find(connection, who, wanted.name)
    record(connection, who, "POST", "/admin/tenants", None, made, status=201, tenant=wanted.name)
    return made


def _remove(connection: Connection, who: Principal, name: str) -> dict[str, Any]:
    found = _find(connection, who, name)
    if name == store.DEFAULT:
        raise Problem(409, "default", "keys that name no tenant are of this one: it stays")
    if found["keys"]:
        raise Problem(409, "in_use", f"{found['keys']} keys of {name!r} still work: revoke them first")
    connection.execute(delete(tenants).where(tenants.c.name == name))
    record(connection, who, "DELETE", "/admin/tenants/" + name, found, None, tenant=name)
    return {"name": name, "removed": True}
