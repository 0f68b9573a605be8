"""The kill switch of a model: whoever asks for it hears that it is disabled, whatever the nodes hold."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, delete, select

from corral.control.audit import record
from corral.control.auth import Caller, Principal
from corral.control.context import Here
from corral.control.models import ModelName
from corral.fleet.node import canonical_name
from corral.store.database import insert
from corral.store.tables import disabled_models

router = APIRouter(tags=["models"])
Names = Annotated[list[ModelName], Field(min_length=1, max_length=100)]


class Disabled(BaseModel):
    """Models to disable, and why."""

    model_config = ConfigDict(extra="forbid")

    models: Names
    reason: Annotated[str, Field(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")] | None = Field(
        None, description="For operators; callers are not told."
    )


class Enabled(BaseModel):
    """Models to enable again."""

    model_config = ConfigDict(extra="forbid")

    models: Names


@router.post("/admin/models/disable")
async def disable_models(control: Here, caller: Caller, wanted: Disabled) -> dict[str, Any]:
    """Refuse all new requests for models; says which gateways have taken note within a second, and who holds them not.

    Answers that have begun go on.
    """
    names = _names(wanted.models)
    after = await control.database.write(_disable, caller, names, wanted.reason)
    catalogue = control.catalogue.entries
    held = {str(entry["name"]) for node in control.fleet.members.values() for entry in node.tags}
    unknown = [name for name in names if name not in held and name not in catalogue]
    return {"disabled": after, "gateways": await control.hub.spread(), "unknown": unknown}


@router.post("/admin/models/enable")
async def enable_models(control: Here, caller: Caller, wanted: Enabled) -> dict[str, Any]:
    """Take requests for models again; says which gateways have taken note within a second, and who was not disabled."""
    after, strange = await control.database.write(_enable, caller, _names(wanted.models))
    return {"disabled": after, "gateways": await control.hub.spread(), "unknown": strange}


def _names(models: list[str]) -> list[str]:
    return list(dict.fromkeys(canonical_name(name) for name in models))


# -- in the database


def _listed(connection: Connection) -> list[dict[str, Any]]:
    rows = connection.execute(select(disabled_models).order_by(disabled_models.c.name)).mappings()
    return [dict(row) for row in rows]


def _disable(connection: Connection, who: Principal, names: list[str], reason: str | None) -> list[dict[str, Any]]:
    before, now = _listed(connection), time.time()
    for name in names:
        made = insert(connection, disabled_models).values(name=name, reason=reason, disabled=now)
        connection.execute(made.on_conflict_do_nothing())
    return _recorded(connection, who, "disable", before)


def _enable(connection: Connection, who: Principal, names: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    before = _listed(connection)
    connection.execute(delete(disabled_models).where(disabled_models.c.name.in_(names)))
    off = {row["name"] for row in before}
    return _recorded(connection, who, "enable", before), [name for name in names if name not in off]


def _recorded(connection: Connection, who: Principal, verb: str, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    after = _listed(connection)
    record(connection, who, "POST", f"/admin/models/{verb}", {"disabled": before}, {"disabled": after})
    return after
