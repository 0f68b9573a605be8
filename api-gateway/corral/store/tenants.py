"""Tenants: whom keys and records belong to."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Connection, func, insert, select

from corral.store.tables import keys, tenants

DEFAULT = "default"


def enter(connection: Connection, name: str, **limits: int | None) -> bool:
    """Make a tenant unless it is there; whether it was made."""
    if connection.execute(select(tenants.c.name).where(tenants.c.name == name)).first() is not None:
        return False
    connection.execute(insert(tenants).values(name=name, created=time.time(), **limits))
    return True


def find(connection: Connection, name: str) -> dict[str, Any] | None:
    """A tenant with the number of its keys that still work, None where there is none of that name."""
    return next(iter(listed(connection, name)), None)


def listed(connection: Connection, name: str | None = None) -> list[dict[str, Any]]:
    """All tenants (or the one of that name) by name, each with the number of its keys that still work."""
    alive = keys.c.revoked.is_(None) & (keys.c.expires.is_(None) | (keys.c.expires > time.time()))
    count = (
        select(func.count())
        .select_from(keys)
        .where((keys.c.tenant == tenants.c.name) & alive)
        .correlate(tenants)
        .scalar_subquery()
    )
    wanted = select(*tenants.columns, count.label("keys")).order_by(tenants.c.name)
    if name is not None:
        wanted = wanted.where(tenants.c.name == name)
    return [dict(row) for row in connection.execute(wanted).mappings()]
