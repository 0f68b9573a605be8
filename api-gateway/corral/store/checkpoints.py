"""Signed checkpoints as the database has them."""

from __future__ import annotations

from sqlalchemy import Connection, func, select

from corral.store.tables import audit_checkpoints


def lines_after(connection: Connection, number: int, limit: int) -> list[str]:
    """Checkpoints as lines, those behind a number."""
    column = audit_checkpoints.c
    wanted = select(column.line).where(column.number > number).order_by(column.number).limit(limit)
    return list(connection.execute(wanted).scalars())


def last_checkpoint(connection: Connection) -> int:
    """The number of the last checkpoint that the database has."""
    return connection.execute(select(func.max(audit_checkpoints.c.number))).scalar() or 0
